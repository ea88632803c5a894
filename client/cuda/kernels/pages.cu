// SPDX-License-Identifier: Apache-2.0
//
// What a lane launches (native/shm/stream.c, which knows these parameters): pages of a paged write, targets of a scatter, the rows of a plan,
// and a bump of a watcher for CUDA graphs. Compiled by NVRTC on first use, without any header.
//
// A block is (threads of a piece, pieces): 256 threads of one piece, or 8 warps with a small piece each. Along y a grid has the chunks of a
// piece. Tables are read from mapped host memory, where each read crosses PCIe: one thread of a piece reads for all.
//
// The last block that is through stores the lane's word, so that nothing has to follow on the stream. Each block arrives by an atomic of GPU
// scope that releases what its threads wrote (ordered before it by the block's barrier), the last one acquires all of that by its own, and
// releases it with the word at system scope; releases are cumulative (PTX ISA, Memory Consistency Model, Release and Acquire Patterns;
// Causality Order).

typedef unsigned int u32;
typedef unsigned long long u64;

#define THREADS 256
#define RESIDENT 8 // blocks of a multiprocessor: as many threads as it has, and few registers beside what an application computes
#define PIECES 8   // of a block
#define SLOTS 4096 // TFD_LANE_SLOTS of transferd/lane.h
#define MARKS 16   // TFD_COPY_MARKS of transferd/abi.h

struct slice { // struct tfd_slice
	u64 src_offset;
	u64 dst_offset;
	u64 length;
};

struct place { // struct tfd_plan_place
	u64 address;
	u64 bytes;
};

struct target { // struct tfd_target
	u64 grant;
	u64 src_offset;
	u64 dst_offset;
	u64 length;
};

// Of the launch that runs on a lane, by the slot of its watcher; 0 between launches. Blocks that are through; what rows_of has found, and 2,
// or 1 while it looks.
static __device__ u64 arrived[SLOTS];
static __device__ u64 judged[SLOTS];

static __device__ bool is_first()
{
	return !(threadIdx.x | threadIdx.y);
}

// A copy whose job has ended before its trigger was reached: its mark (struct tfd_copy_marks) was set before; the host's word is never cached.
static __device__ bool is_void(const u32 *marks, u64 value)
{
	return marks && *(const volatile u32 *)&marks[value % MARKS] == ((u32)(value << 1) | 1);
}

// How many rows or pages there are: `count`, or what the head of a plan's table says, if that is not more; none of a copy that is void. Called
// by the first thread of a block. What is one for a launch is read from the host's memory once, by the block that comes first: uncached reads of
// one address queue up there, 1.1 us each on an H200, and 1,024 blocks would take a millisecond. Who waits here waits for a block that runs.
static __device__ u32 rows_of(const u32 *head, u32 count, const u32 *marks, u64 value, u32 slot)
{
	const bool shared = (u64)gridDim.x * gridDim.y > 1;
	u64 found = 0;

	if (!head && !marks)
		return count;
	if (shared) {
		asm volatile("atom.relaxed.gpu.cas.b64 %0, [%1], 0, 1;" : "=l"(found) : "l"(&judged[slot]) : "memory");
		if (found) {
			while (found == 1)
				asm volatile("ld.acquire.gpu.u64 %0, [%1];" : "=l"(found) : "l"(&judged[slot]) : "memory");
			return (u32)(found - 2);
		}
	}
	if (head) {
		const u32 told = *(const volatile u32 *)head;

		count = told <= count ? told : 0;
	}
	if (is_void(marks, value))
		count = 0;
	if (shared)
		asm volatile("st.release.gpu.u64 [%0], %1;" ::"l"(&judged[slot]), "l"((u64)count + 2) : "memory");
	return count;
}

// At the end of every block.
static __device__ void tell(u64 *word, u64 value, u32 slot)
{
	const u64 blocks = (u64)gridDim.x * gridDim.y;
	u64 before;

	__syncthreads();
	if (!is_first())
		return;
	if (blocks > 1) {
		asm volatile("atom.acq_rel.gpu.add.u64 %0, [%1], 1;" : "=l"(before) : "l"(&arrived[slot]) : "memory");
		if (before != blocks - 1)
			return;
		arrived[slot] = 0; // the lane's next launch begins after this one has ended
		judged[slot] = 0;
	}
	asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

// One load under way for each thread, and as many threads as there are registers for: that hides the latency as well as several loads of
// fewer threads do, and a block finds room beside an application's, whose registers are many.
template <typename T>
static __device__ void copy_by(char *to, const char *from, u32 bytes)
{
	const u32 step = blockDim.x * sizeof(T);

#pragma unroll 1
	for (u32 at = threadIdx.x * sizeof(T); at < bytes; at += step)
		*(T *)(to + at) = *(const T *)(from + at);
}

// The bytes in front of a boundary of T, then Ts, then what is left.
template <typename T>
static __device__ void copy_aligned(char *to, const char *from, u32 bytes)
{
	const u32 unit = sizeof(T);
	const u32 before = (u32)(0 - (u64)to) & (unit - 1);
	const u32 head = before < bytes ? before : bytes;
	const u32 whole = (bytes - head) & ~(unit - 1);

	if (head)
		copy_by<char>(to, from, head);
	copy_by<T>(to + head, from + head, whole);
	if (head + whole < bytes)
		copy_by<char>(to + head + whole, from + head + whole, bytes - head - whole);
}

static __device__ void copy(char *to, const char *from, u32 bytes)
{
	const u32 apart = (u32)(u64)to ^ (u32)(u64)from;

	if (!(apart & 15))
		copy_aligned<uint4>(to, from, bytes);
	else if (!(apart & 3))
		copy_aligned<u32>(to, from, bytes);
	else
		copy_by<char>(to, from, bytes);
}

// A chunk is below 2^31 bytes (chunk_of in stream.c).
static __device__ void copy_chunk(u64 to, u64 from, u64 bytes, u64 chunk)
{
	const u64 first = (u64)blockIdx.y * chunk;

	if (first < bytes)
		copy((char *)(to + first), (const char *)(from + first), (u32)(bytes - first < chunk ? bytes - first : chunk));
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
tfd_pages(u64 src, u64 dst, u64 src_stride, u64 dst_stride, u64 bytes, const uint2 *table, u32 count, u64 chunk,
          const u32 *marks, u64 *word, u64 value, u32 slot)
{
	__shared__ uint2 entries[PIECES]; // struct tfd_page: of the source, of the destination
	__shared__ u32 rows;
	const u32 i = blockIdx.x * blockDim.y + threadIdx.y;

	if (!threadIdx.x)
		entries[threadIdx.y] = table && i < count ? table[i] : uint2{ 0, 0 };
	if (is_first())
		rows = rows_of(nullptr, count, marks, value, slot);
	__syncthreads();
	if (i < rows) {
		const uint2 at = entries[threadIdx.y];

		copy_chunk(dst + at.y * dst_stride, src + at.x * src_stride, bytes, chunk);
	}
	tell(word, value, slot);
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
tfd_targets(u64 src, const target *table, const u64 *places, u32 count, u64 chunk, const u32 *marks, u64 *word,
            u64 value, u32 slot)
{
	__shared__ u64 from[PIECES], to[PIECES], bytes[PIECES];
	__shared__ u32 rows;
	const u32 i = blockIdx.x * blockDim.y + threadIdx.y;

	if (!threadIdx.x && i < count) {
		const u64 place = *(const volatile u64 *)&places[i]; // 0: its grant was taken back before the trigger

		from[threadIdx.y] = src + table[i].src_offset;
		to[threadIdx.y] = place + table[i].dst_offset;
		bytes[threadIdx.y] = place ? table[i].length : 0;
	}
	if (is_first())
		rows = rows_of(nullptr, count, marks, value, slot);
	__syncthreads();
	if (i < rows)
		copy_chunk(to[threadIdx.y], from[threadIdx.y], bytes[threadIdx.y], chunk);
	tell(word, value, slot);
}

// Of a plan which rows there are is read when the stream gets there: a kernel may have filled them right before. No daemon has looked at them
// yet, so what leaves its region or grant is left out here; the daemon ends that job when it counts. Behind struct tfd_plan_table's line.
static __device__ bool is_within(u64 offset, u64 length, u64 bytes)
{
	return offset <= bytes && length <= bytes - offset;
}

#define HEAD_WORDS 16 // sizeof(struct tfd_plan_table)

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
tfd_plan_pages(u64 src, u64 dst, u64 src_stride, u64 dst_stride, u64 bytes, const u32 *head, u32 capacity, u64 src_legal, u64 dst_legal,
               u64 chunk, const u32 *marks, u64 *word, u64 value, u32 slot)
{
	__shared__ uint2 entries[PIECES];
	__shared__ u32 rows;
	const u32 i = blockIdx.x * blockDim.y + threadIdx.y;

	if (!threadIdx.x)
		entries[threadIdx.y] = i < capacity ? ((const uint2 *)(head + HEAD_WORDS))[i] : uint2{ 0, 0 };
	if (is_first())
		rows = rows_of(head, capacity, marks, value, slot);
	__syncthreads();

	const uint2 at = entries[threadIdx.y];

	if (i < rows && at.x < src_legal && at.y < dst_legal)
		copy_chunk(dst + at.y * dst_stride, src + at.x * src_stride, bytes, chunk);
	tell(word, value, slot);
}

// A block in x a row; those in y take its chunks in turns, for how many there are nobody knew.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT)
tfd_plan_slices(u64 src, u64 src_bytes, const u32 *head, const place *places, u32 capacity, u64 chunk, const u32 *marks, u64 *word,
                u64 value, u32 slot)
{
	__shared__ u64 from, to, bytes;
	const u32 i = blockIdx.x;

	if (is_first()) {
		const slice row = ((const slice *)(head + HEAD_WORDS))[i];
		const place at = places[i];
		const bool wanted = i < rows_of(head, capacity, marks, value, slot) && is_within(row.src_offset, row.length, src_bytes) &&
		                    is_within(row.dst_offset, row.length, at.bytes);

		from = src + row.src_offset;
		to = at.address + row.dst_offset;
		bytes = wanted ? row.length : 0;
	}
	__syncthreads();
	for (u64 at = blockIdx.y * chunk; at < bytes; at += gridDim.y * chunk)
		copy((char *)(to + at), (const char *)(from + at), (u32)(bytes - at < chunk ? bytes - at : chunk));
	tell(word, value, slot);
}

// One thread. A word has one writer, so that reading and writing it need not be one step.
extern "C" __global__ void tfd_bump(u64 *word, u64 n)
{
	u64 value;

	asm volatile("ld.relaxed.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
	// What the stream did before this kernel is visible to its threads; released with the word.
	asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(word), "l"(value + n) : "memory");
}
