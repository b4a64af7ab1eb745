"""MRPO inside other trainers: their generation and their loops, our steps, rewards, shaping and loss.

Each module needs the package that it is named after and says so when it is missing; nothing else of mrpo imports them.
"""
