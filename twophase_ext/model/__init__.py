"""A user's model as the paper sees it: found, watched and run, never copied in words."""
