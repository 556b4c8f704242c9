"""Figures of the Learn tab: records of `quantlab.learn` as Plotly, one file a walkthrough."""
