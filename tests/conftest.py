"""What every test of the suite shares. Tests import the tiny tokenizers and models by ``from tiny import ...``."""
