/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Messages between workers, as they are written: requests of a connection's outgoing half, and their answers. Both halves have the same
 * memory, frames of which are written by the far half with an immediate of name space 0 (channel.c).
 */
#ifndef TFD_FRAMES_H
#define TFD_FRAMES_H

#include <stdint.h>

#include "transferd/abi.h"

#define TFD_CALLS 16u /* requests in flight of one connection; the frame of a request is that of its answer */

enum tfd_message_kind {
	TFD_MESSAGE_SEND =
		1, /* the payload into a slot of mailbox `target`; `argument`: who asks, for READY */
	TFD_MESSAGE_VERIFY = 2, /* ranges of the memory with key `target` have checksum `argument` */
};

enum tfd_answer {
	TFD_ANSWER_OK = 1,
	TFD_ANSWER_FULL = 2, /* no slot is free; READY follows when one is */
	TFD_ANSWER_REFUSED = 3, /* `argument`: enum tfd_detail */
};

struct tfd_frame {
	uint64_t token; /* of the half that it is meant for */
	uint64_t target;
	uint32_t kind; /* request: enum tfd_message_kind; answer: enum tfd_answer */
	uint32_t bytes; /* of the payload, which follows; answers have none */
	uint32_t argument;
	uint32_t name_space; /* of the session whose memory is meant */
	uint32_t check; /* on rails that keep no order: CRC-32C of it, with 0 here, and of the payload */
	uint32_t _pad[7];
};

#define TFD_REQUEST_BYTES (sizeof(struct tfd_frame) + TFD_MESSAGE_BYTES_MAX)
/* Of a half's memory: requests, answers, and ASK and SEEN, both ways. */
#define TFD_FRAMES_BYTES                                                                            \
	(TFD_CALLS * (TFD_REQUEST_BYTES + sizeof(struct tfd_frame)) + 4 * sizeof(struct tfd_frame))

#endif
