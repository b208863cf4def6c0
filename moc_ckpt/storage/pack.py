"""Packs: the bytes one rank wrote for one checkpoint (DESIGN section 10). The public face of the pack modules."""

from moc_ckpt.storage.pack_layout import PackLayout, plan_pack
from moc_ckpt.storage.pack_read import PackReader
from moc_ckpt.storage.pack_write import ByteSource, PackResult, PieceSource, write_pack

__all__ = ["ByteSource", "PackLayout", "PackReader", "PackResult", "PieceSource", "plan_pack", "write_pack"]
