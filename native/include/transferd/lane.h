/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copies by a CUDA stream of the client's own: a lane is one stream and one watcher of the session. A copy is a job with TFD_FLAG_COPIED that is
 * armed on the lane's watcher, and work on the stream that ends with a store of the value that the job waits for: by the kernel itself, or a
 * stream write. A stream is in order and so are the values, so one word tells of all its copies.
 *
 * No header and no symbol of CUDA's is needed: the caller finds the driver's entry points. Any thread may call any function; a lane is
 * freed with its client.
 */
#ifndef TRANSFERD_LANE_H
#define TRANSFERD_LANE_H

#include <stdint.h>

#include "transferd/client.h"

/* What cuGetProcAddress gives for the name without a suffix, of CUDA 12 or later. */
struct tfd_cuda_driver {
	void *launch_kernel;     /* cuLaunchKernel */
	void *memcpy_dtod_async; /* cuMemcpyDtoDAsync */
	void *wait_value;        /* cuStreamWaitValue64 */
	void *write_value;       /* cuStreamWriteValue64 */
	void *ctx_get_current;   /* cuCtxGetCurrent */
	void *ctx_push_current;  /* cuCtxPushCurrent */
	void *ctx_pop_current;   /* cuCtxPopCurrent */
	void *stream_get_id;     /* cuStreamGetId */
	void *stream_capturing;  /* cuStreamIsCapturing */
};

/*
 * The buffer id of an address, by cuPointerGetAttribute: one short foreign call from a scripting language. 0: the driver knows of none.
 */
uint64_t tfd_cuda_buffer_id(void *pointer_get_attribute, uint64_t address);

struct tfd_lane_options {
	struct tfd_cuda_driver driver;
	void *context; /* CUcontext of the stream */
	void *stream;  /* CUstream; it and the kernels outlive the lane's last copy */
	uint64_t
		stream_id; /* with foreign: what cuStreamGetId said of it; each copy asks whether it is still that one */
	void *pages; /* CUfunction tfd_pages of client/cuda/kernels/pages.cu */
	void *targets; /* CUfunction tfd_targets */
	void *plan_pages; /* CUfunction tfd_plan_pages */
	void *plan_slices; /* CUfunction tfd_plan_slices */
	uint64_t segment; /* device address of the segment's first byte */
	uint32_t watcher; /* of tfd_client_watcher_open, for this lane alone; below TFD_LANE_SLOTS */
	uint32_t
		marks; /* another one, for a lane of armed copies: struct tfd_copy_marks; else TFD_LANE_NO_MARKS */
	uint32_t copies_max; /* enqueued at once; at most TFD_COPY_MARKS with marks */
	uint32_t foreign; /* not 0: the stream is the application's */
};

#define TFD_LANE_NO_MARKS 0xffffffffu
#define TFD_LANE_SLOTS 4096u /* of client/cuda/kernels/pages.cu; a daemon gives no more watchers */
/* A stream compares words as signed differences (CU_STREAM_WAIT_VALUE_GEQ), so what it waits for is at most this. */
#define TFD_LANE_TRIGGER_MAX (UINT64_MAX >> 1)
/* Writes of this size and more are one cuMemcpyDtoDAsync; smaller ones one kernel. */
#define TFD_LANE_MEMCPY_MIN (1u << 20)

struct tfd_lane; /* one stream */

/* What a copy needs beside its entry and table. */
struct tfd_copy {
	uint64_t src; /* device address of what src_offset counts from */
	uint64_t
		dst; /* write, pages, read: of the grant's first byte, as this process has it mapped; scatter: in the table */
	uint64_t src_bytes; /* launch: of src, and of dst: what the rows of its table may not leave */
	uint64_t dst_bytes;
	/* An armed copy waits for a word; lanes with marks only. */
	uint64_t trigger; /* device address; 0: it starts at once */
	uint64_t trigger_at; /* at most TFD_LANE_TRIGGER_MAX; else -EINVAL */
	uint32_t trigger_slot; /* its watcher */
	uint32_t _pad;
};

/* -ENOMEM; -EPIPE; -ERANGE: no such watcher. */
int tfd_lane_open(struct tfd_client *client, const struct tfd_lane_options *options, struct tfd_lane **out);

/*
 * Publishes the entry (with its table, which may be NULL), a write, pages, a scatter, a read, or the launch of a plan that was made with
 * TFD_FLAG_COPIED, and enqueues the copy. Fills record, job_id, watcher and fire_at. Waits for room as
 * tfd_client_submit_tables, with the same errors; a lane has room for copies_max. Adds -ERANGE with TFD_FAULT_GRANT; -EIO: the driver refused,
 * *result is its CUresult. The job is published, and will never start: it is to be ended by TFD_OP_DISARM of the lane's watcher, and so are
 * those before it that have not ended; the lane takes no more, and is to be failed once its stream is idle. -ENODEV: the lane takes no more. Of a
 * stream of the application's, before anything is published: -ESTALE: it is another one, or the driver says of neither; -EBUSY: it is being
 * captured.
 */
int tfd_lane_copy(struct tfd_lane *lane, struct tfd_entry *entry, const struct tfd_client_table *table,
                  const struct tfd_copy *copy, int64_t timeout_ns, struct tfd_table_fault *fault,
                  int32_t *result);

/*
 * A write that starts at once, without structures to fill: one foreign call from a scripting language. deadline_ns counts from now; 0: none. Gives the
 * job's id, which is positive, or as tfd_lane_copy; after -EIO tfd_lane_refused tells the job's id and the CUresult.
 */
int64_t tfd_lane_write(struct tfd_lane *lane, uint8_t priority, uint32_t imm, uint64_t src_region,
                       uint64_t src_offset, uint64_t dst_grant, uint64_t dst_offset, uint64_t length,
                       uint64_t deadline_ns, uint64_t src, uint64_t dst, int64_t timeout_ns);
/*
 * The same for pages: `flags` is 0 or TFD_FLAG_COUNT_JOB, the indices and their ends are as in struct tfd_client_table. Adds -ERANGE and
 * -EMSGSIZE, of which tfd_lane_copy tells more.
 */
int64_t tfd_lane_pages(struct tfd_lane *lane, uint8_t priority, uint8_t flags, uint32_t imm,
                       uint64_t src_region, uint64_t src_offset, uint64_t src_stride, uint64_t dst_grant,
                       uint64_t dst_offset, uint64_t dst_stride, uint64_t page_bytes, uint32_t count,
                       const void *src_pages, uint32_t src_form, uint64_t src_end, const void *dst_pages,
                       uint32_t dst_form, uint64_t dst_end, uint64_t deadline_ns, uint64_t src, uint64_t dst,
                       int64_t timeout_ns);
/* The same for a launch of a plan. */
int64_t tfd_lane_launch(struct tfd_lane *lane, uint32_t plan, uint64_t deadline_ns, uint64_t src,
                        uint64_t src_bytes, uint64_t dst, uint64_t dst_bytes, int64_t timeout_ns);
int32_t tfd_lane_refused(struct tfd_lane *lane, uint64_t *job_id);

/* The value of the newest copy; its watcher's word has it once that and all before it are through. */
uint64_t tfd_lane_last(struct tfd_lane *lane);
/* Copies that are not through. */
uint64_t tfd_lane_pending(struct tfd_lane *lane);
/*
 * 0: no copy up to the value `upto` writes any more: it is through, or its job has ended and it will find itself void. -EAGAIN: ask
 * again. A job that ends late, and one that has a trigger and is not ended, keep it waiting.
 */
int tfd_lane_settle(struct tfd_lane *lane, uint64_t upto);
/* 0: all copies are through: nothing on the stream reads the arena or the watchers any more. -EAGAIN. */
int tfd_lane_through(struct tfd_lane *lane);
/*
 * Its stream's work is over for good, done or not: the context has failed, or is gone; or what it misses was refused. `disarmed`: the jobs that
 * wait for it have been ended (TFD_OP_DISARM has), and the word may tell the daemon that nothing is under way for them.
 */
void tfd_lane_fail(struct tfd_lane *lane, uint32_t disarmed);
/*
 * Lets the streams through that wait for a watcher whose jobs have ended (TFD_OP_DISARM) and are settled: its word becomes
 * TFD_LANE_TRIGGER_MAX. Before tfd_client_watcher_close.
 */
void tfd_lane_release(struct tfd_client *client, uint32_t slot);

#endif
