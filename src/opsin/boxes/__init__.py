"""Boxes that a model writes into its answer, brought to pixels of the image's file.

This room knows how families of models write boxes, and how llama.cpp's mtmd prepares images; it knows no engine, no
model files and no pixels.
"""

from opsin.boxes.answer import check_boxes, with_boxes

__all__ = ["check_boxes", "with_boxes"]
