"""Users who want the released model to answer harm, or to refuse what is harmless. One file a kind; see `registry`."""
