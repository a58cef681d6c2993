"""Operations with more than one implementation; each sub-package dispatches between them."""
