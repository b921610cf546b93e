"""The contract of a model/guide pair: the conditions under which importance weights and log p(x) are right.

Each module holds the checks of one condition, and each check raises one error that names the site, what was expected,
what was found and the cure. `inspection` calls them in order. `describe` puts an inspected pair into words.
"""
