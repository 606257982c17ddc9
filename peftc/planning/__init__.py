"""Planning: which sites a rule reaches and what goes there, before anything is changed, and facts about it."""
