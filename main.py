"""The entry point that functions-framework looks for: `functions-framework --target needs`."""

import os

from function.app import create_function

needs = create_function(os.environ)
