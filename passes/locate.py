"""locate: fill the program's site table. See `peftc.locate` for the finders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from peftc.ir.program import Program, operand
from peftc.ir.sites import Linear, Site, as_linear
from peftc.locate.attention import find_attention
from peftc.locate.blocks import assign_blocks, model_site
from peftc.locate.experts import find_experts
from peftc.locate.ffn import find_ffn
from peftc.locate.mixture import find_mixtures
from peftc.locate.plain import find_plain
from peftc.locate.walk import skip_back

TOKEN_INPUTS = ("input_ids", "decoder_input_ids")


@dataclass(frozen=True, slots=True)
class Locate:
    """Find every site; roles of linear sites come from the attention or FFN they belong to, those of embeddings from
    what they look up.
    """

    name: ClassVar[str] = "locate"

    def apply(self, program: Program) -> None:
        linears: dict[fx.Node, Linear] = {}
        for node in program.graph.nodes:
            linear = as_linear(program, node)
            if linear is not None:
                linears[node] = linear
        attention = find_attention(program, linears)
        ffns = find_ffn(program, linears, attention)
        composed = [*attention, *ffns, *find_mixtures(program, ffns)]
        plain = [*find_experts(program), *find_plain(program, linears)]
        _assign_roles(program, composed, plain)
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        found = sorted([*composed, *plain], key=lambda site: order[site.anchor])
        blocks = assign_blocks(program, found)
        program.sites = (*found, *blocks, model_site(program))


def _assign_roles(program: Program, composed: list[Site], plain: list[Site]) -> None:
    roles = {linear.node: role for site in composed for role, linear in site.linears.items()}
    tokens = {program.placeholders("input").get(name) for name in TOKEN_INPUTS}
    for site in plain:
        if site.kind == "linear":
            site.role = roles.get(site.linears["out"].node, "other")
        elif site.kind == "embedding":
            looked_up = skip_back(operand(site.taps["out"].node, 1))
            site.role = "token" if looked_up in tokens else "other"
