/* SPDX-License-Identifier: Apache-2.0 */
/* What the files of this provider share. */
#ifndef TFD_LIBFABRIC_DOMAIN_H
#define TFD_LIBFABRIC_DOMAIN_H

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <stdbool.h>

#include "../provider.h"
#include "loader.h"

/* One rail. Constant after opening, but for the libfabric objects, which lock for themselves (FI_THREAD_SAFE). */
struct tfd_domain {
	const struct tfd_fi_library *library;
	struct fi_info *info;
	struct fid_fabric *fabric;
	struct fid_domain *domain;
	struct fid_av *av;
	/*
	 * One completion queue for all, or (NULL) one for each half: rxm 1.17 leaves a closed endpoint in the wait set of its
	 * queue, and the next fi_trywait reads freed memory. With native tcp the kernel allows 50 queues below one epoll.
	 */
	struct fid_cq *cq;
	/*
	 * With one queue for all: halves by link % TFD_FI_LINKS. An immediate's upper half is the link of the half that it came
	 * by. NULL: each half has a queue, or (EFA) there is no room for a link.
	 */
	struct tfd_half **links; /* worker */
	uint32_t last_link; /* worker; counts up, so that one comes again only after 2^32 others */
	int epoll_fd; /* with a queue for each half: readable while one of them may have work; else -1 */
	bool polled; /* `cq` has no wait fd */
	bool takes_dmabuf; /* no processor reads or writes what is posted or landed */
	struct tfd_fi_efa *efa; /* NULL: another provider */
	struct tfd_half *halves; /* worker; ring of all, next in turn first */
	uint32_t half_count; /* worker */
	size_t address_bytes; /* worker; of any half's address; 0: there has been none */
	/* FI_MR_LOCAL, which rxm over verbs asks for: what is posted names its registration, also where it is empty. */
	struct tfd_mr *nothing; /* owned, of `nothing_bytes`; NULL: not needed */
	uint8_t nothing_bytes[8];
	char protocol[TFD_NAME_MAX];
};

struct tfd_mr {
	struct fid_mr *mr;
	void *descriptor;
};

/* An endpoint. Owner: worker. */
struct tfd_half {
	struct tfd_domain *domain;
	void *owner;
	struct fid_ep *ep; /* owned; NULL once closed */
	struct fid_cq *cq; /* owned; NULL: the domain's is used */
	fi_addr_t far; /* FI_ADDR_UNSPEC until started */
	uint32_t link; /* told to the far half; 0: has none */
	uint32_t far_link; /* goes along with its immediates */
	struct tfd_half *next; /* in domain->halves */
	struct tfd_half *prev;
};

#define TFD_FI_CQ_IMMS 4096u /* arrived immediates in a completion queue, beside what we have posted */
#define TFD_FI_LINKS 65536u /* halves of a rail with one queue for all */

/* A half's address on the peer service; `name` is as long as the provider says. */
struct tfd_fi_address {
	char protocol[TFD_NAME_MAX];
	uint32_t link; /* little-endian, as are all hosts that we run on; 0: none */
	uint8_t name[TFD_ADDRESS_MAX - TFD_NAME_MAX - sizeof(uint32_t)];
};

/* Whether a completion queue that is full grows instead of losing completions. */
bool tfd_fi_queue_grows(const struct tfd_domain *domain);
/* Opens a completion queue with a wait fd. */
int tfd_fi_queue_open(struct tfd_domain *domain, struct fid_cq **out);
/* Makes an endpoint, with a queue of its own where the domain has none. Worker, or control before the worker runs. */
int tfd_fi_half_make(struct tfd_domain *domain, struct tfd_half **out, struct tfd_error *error);
void tfd_fi_half_free(struct tfd_half *half);
/* Closes the endpoint and forgets the far address. */
void tfd_fi_half_close(struct tfd_half *half);
/* Native tcp: ends the connections to its endpoint, which is to be closed next. */
void tfd_fi_hang_up(const struct tfd_half *half);
/* Names a half to those who write by it. -ENOSPC. Worker. */
int tfd_fi_link_take(struct tfd_half *half);
/* Polls the queue of a half, or (NULL) the domain's. */
int tfd_fi_queue_poll(const struct tfd_domain *domain, const struct tfd_half *queue_of, struct tfd_wc *wc,
                      int max);
int tfd_fi_fail(const struct tfd_domain *domain, struct tfd_error *error, const char *what, int rc);

/* Hints for what we ask of every provider; NULL: no memory. */
struct fi_info *tfd_fi_hints(const struct tfd_domain *domain, const char *provider);
int tfd_fi_domain_open(const struct tfd_group_options *options, const char *name, struct tfd_rail_info *info,
                       struct tfd_domain **out, struct tfd_error *error);
void tfd_fi_domain_close(struct tfd_domain *domain);
int tfd_fi_mr_open(struct tfd_domain *domain, void *address, size_t length, uint32_t access,
                   struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error);
int tfd_fi_mr_open_dmabuf(struct tfd_domain *domain, const struct tfd_dmabuf *dmabuf, int writable,
                          struct tfd_mr **out, struct tfd_region_key *key, struct tfd_error *error);
void tfd_fi_mr_close(struct tfd_domain *domain, struct tfd_mr *mr);

#endif
