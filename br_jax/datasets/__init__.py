"""The paper's data sets from a local file or their public home, prepared once (see `load`); rows made of them."""
