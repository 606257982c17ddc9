"""Reference pages and tables, made from peftc's own tables."""
