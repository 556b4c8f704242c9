"""The page: one file a tab. With app.py, the only place that imports gradio."""
