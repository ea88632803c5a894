/* SPDX-License-Identifier: Apache-2.0 */
/*
 * For kernels: bumping watchers, waiting for counters, filling tables of plans. The addresses are watcher.device_ptr, counter.device_ptr and
 * plan.device_ptr of the SDK; they lie in host memory that CUDA knows. Needs a device of compute capability 7.0 or later; compiles with nvcc and NVRTC, without any other header.
 *
 * The other side is the daemon's worker, a thread of the host, hence everything here is of system scope:
 *
 * * bump() releases: the worker loads the word with acquire (native/core/armed.c), so what happened before the bump is visible to the jobs
 *   that it starts. A release is cumulative: writes of other threads count as well if they happen before this thread's bump by
 *   synchronization of the kernel's own, as __syncthreads() for a block, or grid.sync(). Without it only the bumping thread's are meant.
 * * read() and wait() acquire: the worker adds to a gate with release after the writes that it counts, and a copying stream writes its word
 *   (which the worker has acquired before) after its copies, so the data is visible to the thread that read the count; to others of its
 *   block after a __syncthreads() that follows.
 *
 * What a NIC has written into GPU memory is another matter: a kernel that runs may see the count first, unless the device's
 * GPU_DIRECT_RDMA_WRITES_ORDERING says otherwise (native/README.md, When data is visible before its count). Launch what uses it behind
 * counter.cuda_wait, or after counter.wait.
 *
 * A kernel that waits occupies the device: whoever it waits for must not need it. A stream can wait instead (counter.cuda_wait).
 */
#ifndef TRANSFERD_DEVICE_CUH
#define TRANSFERD_DEVICE_CUH

namespace transferd {

typedef unsigned long long word;

/* What a gate is raised by while a fault is not acknowledged (TFD_GATE_FAULT of abi.h): no wait stays. */
static const word gate_fault = 1ull << 62;

/* Adds to a watcher. By one thread at a time: a word has one writer, so that loading and storing need not be one step. */
static __device__ inline void bump(word *watcher, word n = 1)
{
	word value;

	asm volatile("ld.relaxed.sys.u64 %0, [%1];" : "=l"(value) : "l"(watcher) : "memory");
	asm volatile("st.release.sys.u64 [%0], %1;" ::"l"(watcher), "l"(value + n) : "memory");
}

/* What a gate holds: the count, or gate_fault and more. */
static __device__ inline word read(const word *gate)
{
	word value;

	asm volatile("ld.acquire.sys.u64 %0, [%1];" : "=l"(value) : "l"(gate) : "memory");
	return value;
}

static __device__ inline bool is_faulted(word value)
{
	return value >= gate_fault;
}

/* Waits until a gate has reached a target; gives what it holds then: to be asked whether it is_faulted. */
static __device__ inline word wait(const word *gate, word target)
{
	word value = read(gate);

	while (value < target) {
		__nanosleep(100); /* a load of host memory takes a microsecond in any case */
		value = read(gate);
	}
	return value;
}

/*
 * The table of a plan, for kernels that say what its next launch copies: plan.device_ptr of the SDK. Fill it, then bump() the watcher that the
 * launch is armed on, which releases what was filled; leave it alone from then on until that job has ended. A row that leaves the plan's
 * source or the grant is not copied, and ends the launch.
 */
struct plan_page { /* pages: indices */
	unsigned src;
	unsigned dst;
};

struct plan_slice { /* write: one; scatter: of each target */
	word src_offset; /* from the plan's source on */
	word dst_offset; /* into the grant */
	word length;
};

struct plan_table {
	unsigned count; /* rows that the launch takes, from the first on; at most those that the plan was made with */
	unsigned _pad[15];
};

static __device__ inline plan_page *pages(plan_table *table)
{
	return (plan_page *)(table + 1);
}

static __device__ inline plan_slice *slices(plan_table *table)
{
	return (plan_slice *)(table + 1);
}

} // namespace transferd

#endif
