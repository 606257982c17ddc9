"""Finding sites by dataflow: rooted matching from an anchor op (an attention op, the second linear of an FFN)
backward to the projections that feed it and forward to what it joins. No module name is looked at, except to say
where a site lives and which block it belongs to.
"""
