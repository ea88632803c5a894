// SPDX-License-Identifier: Apache-2.0
//
// What a lane launches (native/shm/lane.c, which knows these parameters): pages of a paged write, targets of a scatter, and a bump of a
// watcher for CUDA graphs. Compiled by NVRTC on first use, without any header.
//
// A block is (threads of a piece, pieces): 256 threads of one piece, or 8 warps with a small piece each. Along y a grid has the chunks of a
// piece. Tables are read from mapped host memory: 8 bytes a page, by every thread of a piece at once.

typedef unsigned int u32;
typedef unsigned long long u64;

struct page { // struct tfd_page
	u32 src;
	u32 dst;
};

struct target { // struct tfd_target
	u64 grant;
	u64 src_offset;
	u64 dst_offset;
	u64 length;
};

// A copy whose job has ended before its trigger was reached. Its bit was set before; the host's word is never cached.
static __device__ bool is_void(const u64 *voids, u32 bit)
{
	return voids && (*(const volatile u64 *)voids >> bit & 1);
}

template <typename T>
static __device__ void copy_by(char *to, const char *from, u64 bytes)
{
	const T *a = (const T *)from;
	T *b = (T *)to;
	const u64 count = bytes / sizeof(T);
	const u64 step = blockDim.x;
	u64 i = threadIdx.x;

	// Four loads under way for each thread: what hides the latency of a far GPU's memory.
	for (; i + 3 * step < count; i += 4 * step) {
		const T v0 = a[i], v1 = a[i + step], v2 = a[i + 2 * step], v3 = a[i + 3 * step];

		b[i] = v0;
		b[i + step] = v1;
		b[i + 2 * step] = v2;
		b[i + 3 * step] = v3;
	}
	for (; i < count; i += step)
		b[i] = a[i];
}

// The bytes in front of a boundary of `unit`, then units, then what is left.
template <typename T>
static __device__ void copy_aligned(char *to, const char *from, u64 bytes)
{
	const u64 unit = sizeof(T);
	u64 head = (unit - ((u64)to & (unit - 1))) & (unit - 1);

	if (head > bytes)
		head = bytes;
	copy_by<char>(to, from, head);
	to += head;
	from += head;
	bytes -= head;
	copy_by<T>(to, from, bytes);
	copy_by<char>(to + bytes / unit * unit, from + bytes / unit * unit, bytes % unit);
}

static __device__ void copy(char *to, const char *from, u64 bytes)
{
	const u64 apart = (u64)to ^ (u64)from;

	if (!(apart & 15))
		copy_aligned<uint4>(to, from, bytes);
	else if (!(apart & 3))
		copy_aligned<u32>(to, from, bytes);
	else
		copy_by<char>(to, from, bytes);
}

static __device__ void copy_chunk(char *to, const char *from, u64 bytes, u64 chunk)
{
	const u64 first = (u64)blockIdx.y * chunk;

	if (first < bytes)
		copy(to + first, from + first, bytes - first < chunk ? bytes - first : chunk);
}

extern "C" __global__ void __launch_bounds__(256)
tfd_pages(u64 src, u64 dst, u64 src_stride, u64 dst_stride, u64 bytes, const page *table, u32 count, u64 chunk,
          const u64 *voids, u32 bit)
{
	const u32 i = blockIdx.x * blockDim.y + threadIdx.y;
	page at = { 0, 0 };

	if (i >= count || is_void(voids, bit))
		return;
	if (table)
		at = table[i];
	copy_chunk((char *)(dst + at.dst * dst_stride), (const char *)(src + at.src * src_stride), bytes, chunk);
}

extern "C" __global__ void __launch_bounds__(256)
tfd_targets(u64 src, const target *table, const u64 *places, u32 count, u64 chunk, const u64 *voids, u32 bit)
{
	const u32 i = blockIdx.x * blockDim.y + threadIdx.y;

	if (i >= count || is_void(voids, bit))
		return;
	copy_chunk((char *)(places[i] + table[i].dst_offset), (const char *)(src + table[i].src_offset),
	           table[i].length, chunk);
}

// One thread. A word has one writer, so that reading and writing it need not be one step.
extern "C" __global__ void tfd_bump(u64 *word, u64 n)
{
	u64 value;

	asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
	// What the stream did before this kernel is visible to its threads; released with the word.
	asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value + n) : "memory");
}
