/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of this provider share. Everything here is the worker's, but where it says otherwise. */
#ifndef TFD_TCP_H
#define TFD_TCP_H

#include <netinet/in.h>
#include <stdbool.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "../../core/list.h"
#include "../provider.h"
#include "../memory.h"
#include "wire.h"

#define TFD_TCP_PROTOCOL "tcp/1"
#define TFD_TCP_FRAMES 128u  /* posted and not handed to the kernel yet; power of two, as all of these */
#define TFD_TCP_PARTS 2048u  /* further parts of those */
#define TFD_TCP_WRITES 256u  /* posted and not acknowledged */
#define TFD_TCP_BUFFER_BYTES 32768u
#define TFD_TCP_STRANGERS 64u /* connections that have not said yet whom they mean */
#define TFD_TCP_IOVS 1024u    /* IOV_MAX */

/* What an fd of the rail's epoll belongs to. */
enum tfd_tcp_watch_kind {
	TFD_TCP_LISTENER = 0,
	TFD_TCP_STRANGER = 1,
	TFD_TCP_HALF = 2,
};

struct tfd_tcp_watch {
	enum tfd_tcp_watch_kind kind;
};

/* An accepted connection until its hello is complete. */
struct tfd_tcp_stranger {
	struct tfd_tcp_watch watch;
	int fd; /* -1: free */
	uint32_t bytes;
	uint64_t deadline_ns;
	struct tfd_tcp_hello hello;
};

/* Where poll puts what it has to tell. */
struct tfd_tcp_out {
	struct tfd_wc *wc;
	int max;
	int count;
};

/* A rail. */
struct tfd_domain {
	struct tfd_memory memory;
	struct sockaddr_storage address; /* constant; of the listening socket */
	socklen_t address_bytes;
	int listen_fd; /* constant */
	int epoll_fd;  /* constant */
	struct tfd_tcp_watch listener;
	uint64_t accept_ns; /* not before; while no file descriptor is left */
	uint32_t stranger_count;
	struct tfd_tcp_stranger strangers[TFD_TCP_STRANGERS];
	struct tfd_half **numbers; /* owned; halves by number; NULL: free */
	uint32_t number_count;
	uint32_t next_number;
	struct tfd_list halves;
	struct tfd_list sending; /* halves that have something to send, and whose socket may take it */
	struct tfd_list ready;   /* halves that may have something to read or to tell */
	uint32_t passes;
	uint64_t unlooked_bytes; /* taken in since events were asked for */
	struct iovec iov[TFD_TCP_IOVS];
};

/* A posted piece that is not with the kernel yet. */
struct tfd_tcp_frame {
	struct tfd_tcp_header header;
	const void *local; /* borrowed until its completion; of the first part */
	uint32_t first_part;
};

/* What goes out between posted pieces: one at a time. */
struct tfd_tcp_control {
	union {
		struct tfd_tcp_hello hello;
		struct tfd_tcp_header header;
	};
	uint32_t bytes;      /* of hello or header; 0: there is none */
	uint64_t sent;       /* of it and its payload */
	uint64_t key;        /* payload: so many bytes of that memory */
	uint64_t address;
	uint64_t length;
};

struct tfd_tcp_read {
	struct tfd_wr *wr;
	uint8_t *local; /* borrowed until its completion */
	const uint32_t *broken; /* as of its tfd_mr */
	uint64_t length;
	uint64_t landed;
};

struct tfd_tcp_send {
	struct tfd_tcp_control control;
	uint64_t sent; /* bytes of the oldest frame */
	uint32_t head; /* of frames; all such count up for ever */
	uint32_t tail;
	uint32_t part_head;
	uint32_t part_tail;
	uint64_t acked_out; /* writes of the other direction: as told last */
	uint64_t writes;    /* posted */
	uint64_t writes_sent; /* with the kernel, to the last byte */
	uint64_t writes_acked;
	uint64_t writes_told; /* to the core */
	uint64_t reads;
	uint64_t reads_sent;
	uint64_t reads_landed;
	uint64_t reads_told;
	uint64_t refused; /* number of the write, or read, that the far side has refused; 0: none */
	bool refused_read;
	struct tfd_wr *write_wrs[TFD_TCP_WRITES];
	struct tfd_tcp_read read_wrs[TFD_TCP_READS];
	struct tfd_tcp_frame frames[TFD_TCP_FRAMES];
	const void *part_local[TFD_TCP_PARTS];
	struct tfd_tcp_range part_remote[TFD_TCP_PARTS];
};

enum tfd_tcp_receive_state {
	TFD_TCP_HELLO_NEXT = 0,
	TFD_TCP_HEADER_NEXT = 1,
	TFD_TCP_TABLE_NEXT = 2,
	TFD_TCP_PAYLOAD_NEXT = 3,
};

/* A read that the far side has asked for. */
struct tfd_tcp_request {
	uint64_t key;
	uint64_t address;
	uint64_t length;
	uint64_t sent;
};

struct tfd_tcp_receive {
	enum tfd_tcp_receive_state state;
	struct tfd_tcp_header header; /* of the message that is coming in */
	uint32_t range_count;
	uint32_t range;        /* that the next byte belongs to */
	uint64_t range_landed; /* of it */
	uint64_t left;         /* of the payload */
	uint64_t writes;       /* landed, and told to the core */
	uint64_t reads;        /* asked for */
	uint64_t reads_answered;
	uint64_t refused; /* to be told to the far side; then nothing more lands or is sent */
	bool refused_read;
	uint32_t begin; /* of what the buffer holds */
	uint32_t end;
	struct tfd_tcp_request requests[TFD_TCP_READS];
	struct tfd_tcp_range ranges[TFD_TCP_PARTS_MAX]; /* checked; of the header and its table */
	uint8_t buffer[TFD_TCP_BUFFER_BYTES];
};

struct tfd_half {
	struct tfd_tcp_watch watch;
	struct tfd_list link;       /* domain->halves */
	struct tfd_list send_link;  /* domain->sending */
	struct tfd_list ready_link; /* domain->ready */
	struct tfd_domain *domain;
	void *owner;
	int fd; /* -1: not connected yet, lost, or closed */
	uint32_t number;
	uint8_t token[TFD_TCP_TOKEN_BYTES];
	struct tfd_tcp_hello far; /* whom to greet; number and token are in its address */
	bool outgoing;
	bool started;
	bool greeted; /* the far half has shown that it is the one */
	bool blocked; /* the socket takes no more; EPOLLOUT will tell */
	bool hung_up; /* the far side has closed, or the connection broke: to be found out by reading */
	bool drained; /* nothing more is to be read for now */
	bool lost;
	bool deaf;    /* refused something: it only says so and waits for the far side to go */
	bool garbled; /* the far side spoke nonsense; to be told to the core */
	int error;    /* of what is lost with it */
	struct tfd_tcp_send send;
	struct tfd_tcp_receive receive;
};

static inline bool tfd_tcp_room(const struct tfd_tcp_out *out)
{
	return out->count < out->max;
}

static inline void tfd_tcp_tell(struct tfd_tcp_out *out, const struct tfd_wc *wc)
{
	out->wc[out->count++] = *wc;
}

/* rail.c */
int tfd_tcp_domain_open(const struct tfd_group_options *options, const char *name, struct tfd_rail_info *info,
                        struct tfd_domain **out, struct tfd_error *error);
void tfd_tcp_domain_close(struct tfd_domain *domain);

/* accept.c */
void tfd_tcp_accept(struct tfd_domain *domain);
void tfd_tcp_stranger_read(struct tfd_domain *domain, struct tfd_tcp_stranger *stranger);
void tfd_tcp_strangers_check(struct tfd_domain *domain); /* those whose time is over go */

/* half.c */
int tfd_tcp_half_open(struct tfd_domain *domain, int outgoing, void *owner, struct tfd_half **out,
                      void *address, size_t *address_bytes, struct tfd_error *error);
int tfd_tcp_half_start(struct tfd_half *half, const void *address, size_t address_bytes,
                       struct tfd_error *error);
void tfd_tcp_half_close(struct tfd_half *half);
int tfd_tcp_half_drain(struct tfd_half *half, struct tfd_wc *wc, int max);
void tfd_tcp_half_free(struct tfd_half *half);
/* An accepted connection, which it owns from now on, has named it by its hello. */
void tfd_tcp_half_attach(struct tfd_half *half, int fd);
/* Its connection is over: what is posted fails with `error`, positive. */
void tfd_tcp_half_lose(struct tfd_half *half, int error);
/* Completions that are due; whether it has told all. */
bool tfd_tcp_half_tell(struct tfd_half *half, struct tfd_tcp_out *out);

/* send.c */
int tfd_tcp_post(struct tfd_half *half, const struct tfd_post *post, struct tfd_wr *wr);
void tfd_tcp_hello_queue(struct tfd_half *half);
/* Something may be there to be sent: in the next pass. */
void tfd_tcp_send_soon(struct tfd_half *half);
/* Within a pass: one call of the kernel; returns how many bytes it took. */
uint64_t tfd_tcp_flush(struct tfd_half *half);

/* receive.c */
/* Within a pass: takes in what has come, half a MiB or so at most; returns how many bytes. */
uint64_t tfd_tcp_half_receive(struct tfd_half *half, struct tfd_tcp_out *out);

#endif
