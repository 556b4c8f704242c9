"""Figures of the Inspect tab: functions of what `quantlab.inspection` computes."""
