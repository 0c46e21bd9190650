"""Architecture search: a space of small vision transformers, what a search is given, and searches, one file each."""
