/* SPDX-License-Identifier: Apache-2.0 */
/* What fi_raw needs of libfabric: opening, posting, polling, as native/providers/libfabric does them. */
#ifndef FI_RAW_FABRIC_H
#define FI_RAW_FABRIC_H

#include <rdma/fabric.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <stdbool.h>
#include <stdint.h>

#define PIECES_MAX 512

/* What a side tells the other about one direction. */
struct address {
	uint8_t name[128];
	uint64_t key;
	uint64_t memory;
};

struct side {
	int socket; /* to the other process */
	struct fi_info *info;
	struct fid_fabric *fabric;
	struct fid_domain *domain;
	struct fid_av *av;
	uint8_t *memory;
	struct fid_mr *mr;
};

/* One direction's end: an endpoint and its queue. */
struct half {
	struct side *side;
	struct fid_ep *ep;
	struct fid_cq *cq;
	fi_addr_t far;
	struct address there;
	struct fi_context2 contexts[PIECES_MAX];
	struct fi_context2 *unused[PIECES_MAX];
	uint32_t unused_count;
	uint64_t sent; /* acknowledged writes */
	uint64_t arrived;
};

/* Loads libfabric; NULL: what the daemon would take. Errors end the process, here and below. */
void library_load(const char *path, const char *fabric);
void version_print(const struct side *side);

void side_open(struct side *side, int socket, size_t bytes);
struct half *half_open(struct side *side);
/* False: there is no room, poll first. */
bool post(struct half *half, uint64_t offset, size_t length, bool imm);
uint32_t poll_half(struct half *half);

uint64_t now_ns(void);
void tell(int socket, const void *data, size_t bytes);
void hear(int socket, void *data, size_t bytes);
bool heard(int socket); /* a byte, without waiting */

#endif
