"""QuantLab's page: `python app.py [--host ADDRESS] [--port NUMBER]`."""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

from quantlab.ui.page import build
from quantlab.ui.server import launch

demo = build()

if __name__ == "__main__":
    launch(demo)
