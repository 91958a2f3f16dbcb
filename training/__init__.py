import zero123plus  # noqa: F401  # first: it silences what libraries say when they are imported
