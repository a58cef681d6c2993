"""The same job on several machines: Ray runs it, and never owns the state of a search.

Ray is imported only when a command asks for it.
"""
