// Words, and which lane a thread is. Written without any header of the toolkit: the compiler alone is enough.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

constexpr u32 WARP = 0xffffffffu;

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x & 31; }
