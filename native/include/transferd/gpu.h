/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The helper process of one GPU: it copies between that GPU's memory and the pool what the worker of a daemon asks for (stage.h), and
 * has open whatever allocations the daemon's control plane names. It is the only process of the daemon's that opens the CUDA driver.
 *
 * They speak by a socket (SOCK_SEQPACKET) in messages of one size; the daemon asks one thing at a time.
 */
#ifndef TRANSFERD_GPU_H
#define TRANSFERD_GPU_H

#include <stdint.h>

#define TFD_GPU_UUID_BYTES 16u
#define TFD_GPU_HANDLE_BYTES 64u /* CUipcMemHandle */
#define TFD_GPU_CHUNKS 64u /* of one message */
#define TFD_GPU_TEXT 256u
#define TFD_GPU_SEEN 32u

enum tfd_gpu_message_type {
	/* from the helper, once: `text` is the GPU's name, `bytes` the driver's version (13000); `seen` as in ERROR */
	TFD_GPU_HELLO = 1,
	/*
	 * to the helper: open `memory` of `bytes`, by ipc_handle, or, chunk_count not 0, by that many fds that come along and their
	 * chunk_bytes. With `more` the next OPEN brings more chunks of it, and only then it may be copied. Answered by DONE.
	 */
	TFD_GPU_OPEN = 2,
	TFD_GPU_CLOSE = 3, /* to the helper: `memory` is unmapped once DONE is back; none: no error */
	TFD_GPU_DONE = 4, /* from the helper: `result` 0, or `text` says what went wrong */
	/*
	 * from the helper, and it ends: `text` says why, `seen` the UUIDs of the GPUs that there are, zeros behind them; zeros alone where it
	 * did not get as far
	 */
	TFD_GPU_ERROR = 5,
};

struct tfd_gpu_message {
	uint32_t type; /* enum tfd_gpu_message_type */
	int32_t result; /* DONE: 0 or -errno */
	uint64_t memory;
	uint64_t bytes;
	uint32_t chunk_count;
	uint32_t more;
	uint8_t ipc_handle[TFD_GPU_HANDLE_BYTES];
	uint64_t chunk_bytes[TFD_GPU_CHUNKS];
	uint8_t seen[TFD_GPU_SEEN][TFD_GPU_UUID_BYTES];
	char text[TFD_GPU_TEXT]; /* NUL-terminated */
};

struct tfd_gpu_options {
	int control_fd;
	int ring_fd; /* struct tfd_stage */
	int pool_fd;
	int wake_fd; /* eventfd */
	int parent; /* pid of the daemon, with which it ends; 0: it ends by the socket alone */
	uint8_t uuid[TFD_GPU_UUID_BYTES];
	char library[256]; /* path of libcuda.so.1; "" lets dlopen find it */
};

/* Runs until the daemon closes the socket (0) or the GPU cannot be used any more (1, said by ERROR). */
int tfd_gpu_helper_run(const struct tfd_gpu_options *options);

#endif
