/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What goes over a connection, in both directions alike: a hello, then messages: a header, the table of its further parts, its
 * payload. Little-endian, as are all hosts that we run on. Whoever reads trusts nothing of it.
 */
#ifndef TFD_TCP_WIRE_H
#define TFD_TCP_WIRE_H

#include <stdint.h>

#define TFD_TCP_MAGIC 0x31706374u /* "tcp1" */
#define TFD_TCP_TOKEN_BYTES 16u
#define TFD_TCP_PARTS_MAX 512u /* of a write: table and payload of one fit in one sendmsg */
#define TFD_TCP_TOTAL_MAX (1ull << 30)
#define TFD_TCP_READS 64u /* of one direction under way */

/* First of all: names the half that is meant, and that its number was told by its owner. */
struct tfd_tcp_hello {
	uint32_t magic;
	uint32_t number;
	uint8_t token[TFD_TCP_TOKEN_BYTES];
};

enum tfd_tcp_type {
	TFD_TCP_WRITE = 1,   /* table and payload follow; `imm` counts if TFD_TCP_HAS_IMM */
	TFD_TCP_READ = 2,    /* asks for `total` bytes */
	TFD_TCP_DATA = 3,    /* payload follows: the next `total` bytes of read `number` */
	TFD_TCP_ACK = 4,     /* nothing but `ack` */
	TFD_TCP_REFUSED =
		5, /* write (or, if TFD_TCP_OF_READ, read) `number`: its key, or a range; the last of all */
};

#define TFD_TCP_HAS_IMM 1u
#define TFD_TCP_OF_READ 2u

struct tfd_tcp_header {
	uint32_t magic;
	uint8_t type; /* enum tfd_tcp_type */
	uint8_t flags;
	uint16_t parts; /* further ones, in the table */
	uint32_t imm;
	uint32_t _zero;
	uint64_t number; /* writes and reads are counted from 1 on, each by themselves */
	uint64_t ack;    /* writes of the other direction that have landed */
	uint64_t key;
	uint64_t address; /* of the first part */
	uint64_t length;
	uint64_t total; /* bytes of all parts */
};

/* A further part. */
struct tfd_tcp_range {
	uint64_t address;
	uint64_t length; /* not 0 */
};

_Static_assert(sizeof(struct tfd_tcp_hello) == 24, "the wire");
_Static_assert(sizeof(struct tfd_tcp_header) == 64, "the wire");
_Static_assert(sizeof(struct tfd_tcp_range) == 16, "the wire");

#endif
