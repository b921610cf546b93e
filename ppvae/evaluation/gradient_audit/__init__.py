"""The audit of gradient estimators on a pair: bias against enumeration, variance, signal-to-noise, cost.

`audit` runs it, `result` holds `GradientAudit`.
"""
