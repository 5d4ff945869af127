"""Trained models for measurements, made from data that any machine has.

`language_model()`, `digits_vit()` and `digits_cnn()` train on the first call and read from the
cache afterwards.
"""
