"""One folder or file per application: recipe, data, measured outcome."""
