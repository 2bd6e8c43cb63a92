"""Needle in a haystack by depth and length: the heat map that this field looks at first."""
