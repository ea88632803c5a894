/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a test tells the double of libibverbs, and asks it. Found with dlsym, in the library that the provider has opened: every name
 * below is a function of it. Any thread may call any of them. README.md says what the double is.
 */
#ifndef SOFTVERBS_H
#define SOFTVERBS_H

#include <stddef.h>
#include <stdint.h>

/* Of a device since it was configured, or softverbs_counts_clear. */
struct softverbs_counts {
	uint64_t doorbells; /* calls that posted something to a send queue */
	uint64_t posted; /* work requests of those */
	uint64_t longest_chain; /* work requests of one call */
	uint64_t signalled;
	uint64_t inlined;
	uint64_t immediates; /* given to a receive queue of this device */
	uint64_t completions; /* given to the queues of this device, errors among them */
	uint64_t flushed;
	uint64_t rnr; /* immediates that found no entry, tries again among them */
	uint64_t timeouts; /* work requests that nobody answered, tries again among them */
	uint64_t landed_bytes; /* written here by far sides */
	uint64_t relaxed_mrs; /* registered with relaxed ordering */
	uint64_t dmabuf_mrs;
	uint64_t wr_posted; /* work requests posted by the ibv_wr_ functions */
	uint64_t receives_lost; /* taken by queue pairs that ended before anybody had polled that */
	uint32_t
		srq_low; /* fewest entries that any shared queue had left after it gave one; UINT32_MAX: none gave any */
	uint32_t cq_high; /* most completions that any completion queue held */
	uint32_t srq_entries; /* in all shared queues now */
	/* What there is of it now, of all contexts. */
	uint32_t contexts;
	uint32_t pds;
	uint32_t mrs;
	uint32_t channels;
	uint32_t cqs;
	uint32_t srqs;
	uint32_t qps;
};

/* In the place of $SOFTVERBS (README.md); only while no context is open. 0, or -1: a word is not understood. */
int softverbs_configure(const char *text);

void softverbs_counts(const char *device, struct softverbs_counts *out);
void softverbs_counts_clear(const char *device);

/* The port loses its link, or has it again: events of it, and nothing passes meanwhile. */
void softverbs_port(const char *device, uint32_t port, int up);
/* What a subnet manager, or the settings of its interface, give the port: a LID (0: none yet), an enum ibv_mtu. No event tells. */
void softverbs_given(const char *device, uint32_t port, uint32_t lid, uint32_t mtu);
/* An event of the port (enum ibv_event_type), as of a subnet manager that has changed something. */
void softverbs_port_event(const char *device, uint32_t port, int type);
/* An entry of the port's table of partition keys; 0: none. */
void softverbs_pkey(const char *device, uint32_t port, uint32_t index, uint32_t pkey);
/* Its cable is cut: nothing passes either way, and nobody is told. */
void softverbs_cut(const char *device, int on);
/* What is posted waits until it is let go. */
void softverbs_hold(const char *device, int on);
/* Threaded: nothing is carried before it is so old. */
void softverbs_delay(uint64_t ns);
/* The device goes away under its contexts; with `back`, a new one of that name may be opened. */
void softverbs_remove(const char *device);
void softverbs_back(const char *device);

/* A queue pair breaks by itself: IBV_EVENT_QP_FATAL. 0, or -1: there is none of that number. */
int softverbs_qp_fatal(uint32_t qp_num);
/* The numbers of a device's queue pairs, at most `max`; how many there are. */
uint32_t softverbs_qps(const char *device, uint32_t *out, uint32_t max);
/* Its state (enum ibv_qp_state), or -1. */
int softverbs_qp_state(uint32_t qp_num);
/* The next completion of a receive queue (or of a send queue) of the device finds no room. */
void softverbs_overrun(const char *device, int receive);
/* After `skip` more, a work request of the device ends with `status` (enum ibv_wc_status). */
void softverbs_wc_fail(const char *device, uint32_t skip, int status);
/* After `skip` more, one lands as if nothing were wrong, but its acknowledgement is lost for good. */
void softverbs_lose_ack(const char *device, uint32_t skip);

/*
 * The completions of the next `count` immediates that land are not in the queue before their queue pair breaks, and those behind them
 * neither, or before 16 more have landed: their senders have been told, though.
 */
void softverbs_late(const char *device, uint32_t count);
/* What queue pairs that break have taken of their shared queue, and "last WQE reached", waits until it is let go. */
void softverbs_last_hold(const char *device, int on);

/*
 * After `skip` more calls a verb fails with `error`: the one of that name ("ibv_create_qp"), or with NULL whichever it is of those that
 * make or change something. 0 for `error` takes the order back.
 */
void softverbs_fail(const char *verb, uint32_t skip, int error);
/* Whether that has happened. */
int softverbs_failed(void);
/* Memory that may be registered in all, in bytes; 0: as much as there is. Beyond it registering fails with ENOMEM. */
void softverbs_memlock(uint64_t bytes);
/* Changes the kind of an entry of a GID table: a word of `gids` (README.md). IBV_EVENT_GID_CHANGE follows. */
int softverbs_gid(const char *device, uint32_t port, uint32_t index, const char *word);

#endif
