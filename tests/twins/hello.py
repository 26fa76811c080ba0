"""The bare twin: what the framework alone needs from its start to an answer."""


def needs(request):
    """Answer without looking."""
    return "hello"
