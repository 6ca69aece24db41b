"""Stands in for the names of schemes."""

kFp8Dynamic128Sym = "e4m3, a scale for each 128 values"
kFp8Static128BlockSym = "e4m3, a scale for each block of 128 x 128"
kMxfp4Static = "MXFP4, a scale for each 32 values"
