"""Optimizers with stochastic rounding, and the loss scaler for fp16."""
