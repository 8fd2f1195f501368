"""longgrpo inside other trainers: one module a host, imported by name; nothing else in longgrpo imports them."""
