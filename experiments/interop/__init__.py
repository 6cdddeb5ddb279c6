"""Parity with other libraries, measured against them where they are installed, and goldens for where they are not."""
