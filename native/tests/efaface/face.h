/* SPDX-License-Identifier: Apache-2.0 */
/*
 * EFA's face, for tests: a library that answers as libfabric with provider `efa` does, and moves the bytes by the tcp of a real
 * libfabric. README.md tells what it shows of EFA, and the knobs. One lock for all: it is for finding faults, not for speed.
 */
#ifndef TFD_EFAFACE_FACE_H
#define TFD_EFAFACE_FACE_H

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_eq.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>
#include <stdbool.h>
#include <stdint.h>

#include "efaface.h"

#define FACE_PIECES 4 /* at most: of a write that is cut as a device cuts it into packets */
#define FACE_MAX_RDMA (1ull << 30)
#define FACE_TX_SIZE 256
#define FACE_TABLE 4096 /* addresses of an address vector */
#define FACE_INJECT 64 /* of a later version; those up to 2.6 have 0 */

/* Of headers from 1.20 on. */
#define FACE_MR_DMABUF (1ull << 40)
struct face_dmabuf {
	int fd;
	uint64_t offset;
	size_t len;
	void *base_addr;
};

/* Status codes of the device, which the provider hands on as prov_errno. */
#define FACE_BAD_ADDRESS 7 /* remote key, range or right */
#define FACE_ABORT 8
#define FACE_BAD_QPN 9
#define FACE_UNKNOWN_PEER 14
#define FACE_UNREACHABLE 15

/* As a raw address of EFA's: 32 bytes. The tcp address behind it is the last 4 bytes of the GID, and the QPN is the port. */
struct face_address {
	uint8_t gid[16];
	uint16_t qpn;
	uint16_t pad;
	uint32_t qkey;
	uint64_t unused;
};

struct face_library { /* the real libfabric */
	int (*getinfo)(uint32_t version, const char *node, const char *service, uint64_t flags,
	               const struct fi_info *hints, struct fi_info **info);
	void (*freeinfo)(struct fi_info *info);
	struct fi_info *(*dupinfo)(const struct fi_info *info);
	int (*fabric)(struct fi_fabric_attr *attr, struct fid_fabric **fabric, void *context);
	const char *(*strerror)(int error);
	uint32_t (*version)(void);
};

struct face_fabric {
	struct fid_fabric fid;
	bool direct; /* fabric efa-direct */
	uint32_t api_version;
};

struct face_domain {
	struct fid_domain fid;
	struct face_fabric *fabric;
	struct fi_info *info; /* tcp's; owned */
	struct fid_fabric *tcp_fabric;
	struct fid_domain *tcp;
	uint8_t gid[16];
	struct face_mr *mrs;
};

struct face_av {
	struct fid_av fid;
	struct face_domain *domain;
	struct fid_av *tcp;
	struct {
		struct face_address address;
		fi_addr_t tcp;
		uint32_t ops; /* in flight to it */
		bool used, stale; /* stale: removed with ops in flight */
	} entry[FACE_TABLE];
};

struct face_mr {
	struct fid_mr fid;
	struct fid_mr *tcp;
	struct face_domain *domain;
	uint64_t address, length, access;
	uint8_t *memory; /* what `address` is here: of a dma-buf it is nowhere */
	uint8_t *mapping; /* of a dma-buf: ours; else NULL */
	size_t mapping_bytes;
	struct face_mr *next; /* of its domain */
};

struct face_entry { /* of a completion queue; err 0: a completion */
	struct fi_cq_data_entry entry;
	const struct face_ep *ep;
	int err;
	int prov_errno;
};

struct face_cq {
	struct fid_cq fid;
	struct face_domain *domain;
	struct face_entry *ring; /* `size` of them: one more is lost, and FI_EOVERRUN told */
	size_t size, head, count;
	bool overrun;
	bool waits; /* was opened with FI_WAIT_FD */
	int epoll_fd;
	struct fid_cq *tcp; /* of all endpoints; NULL: with rxm, which does not bear it, each has its own */
	struct face_ep *eps;
	struct face_op *ended; /* of closed endpoints, which tcp may speak of until it is closed */
};

struct face_piece {
	struct fi_context2 context; /* first: what tcp returns */
	struct face_op *op;
	size_t offset, length;
	uint64_t due; /* tick from which it may go out */
	bool posted, done;
};

struct face_op {
	struct face_op *next; /* of its endpoint, the oldest first */
	struct face_ep *ep; /* NULL: closed */
	struct fi_context2 *context; /* the caller's */
	uint64_t flags;
	uint8_t *local;
	void *tcp_desc;
	size_t length;
	uint64_t remote, key, data;
	fi_addr_t to;
	uint64_t number, since_ms;
	uint64_t told_at; /* tick from which its completion is in the queue */
	int err, prov_errno;
	uint32_t pieces, left; /* not done */
	bool read, has_imm;
	struct face_piece piece[FACE_PIECES];
};

struct face_ep {
	struct fid_ep fid;
	struct face_domain *domain;
	struct face_av *av;
	struct face_cq *cq;
	struct fid_ep *tcp;
	struct fid_cq *tcp_cq; /* owned, or the queue's */
	struct face_address name;
	bool enabled;
	size_t inject; /* so many bytes at most of a write are copied by the processor */
	struct face_op *ops, **last;
	uint32_t op_count;
	uint64_t tick;
	uint64_t last_released; /* number of the op that went out last */
	struct face_ep *next; /* of its queue */
	struct face_ep *all; /* of all */
};

extern struct face_library face_real;
extern struct efaface_control face_control;
extern struct efaface_stats face_stats;

void face_lock(void);
void face_unlock(void);
uint32_t face_random(uint32_t below);
uint64_t face_now_ms(void);
uint32_t face_version(void);
/* Whether the real library's tcp is rxm's. */
bool face_is_rxm(void);
/* A mistake of the caller's by which the real library would crash, or do what nobody asked for. */
void face_abort(const char *what) __attribute__((noreturn));

/* What an object has not. */
int face_no_bind(struct fid *fid, struct fid *other, uint64_t flags);
int face_no_control(struct fid *fid, int command, void *argument);

int face_fabric_open(struct fi_fabric_attr *attr, struct fid_fabric **out, void *context);
/* tcp's info for the address of a device. */
int face_tcp_info(const char *ip, struct fi_info **out);
/* The device of a domain's name, "" if there is none of that name. */
const char *face_device_ip(const char *domain_name);
void face_gid(const char *ip, uint8_t gid[16]);

int face_ep_open(struct fid_domain *domain, struct fi_info *info, struct fid_ep **out, void *context);
int face_ep_getopt(fid_t fid, int level, int name, void *value, size_t *bytes);
int face_ep_setopt(fid_t fid, int level, int name, const void *value, size_t bytes);
void face_ep_progress(struct face_ep *ep);
bool face_ep_waits(const struct face_ep *ep);
int face_cq_open(struct fid_domain *domain, struct fi_cq_attr *attr, struct fid_cq **out, void *context);
void face_cq_push(struct face_cq *cq, const struct face_entry *entry);
/* Drops what is there of an endpoint: the provider ignores what a queue holds of a queue pair that was destroyed. */
void face_cq_purge(struct face_cq *cq, const struct face_ep *ep);
int face_cq_trywait(struct face_cq *cq);
int face_av_open(struct fid_domain *domain, struct fi_av_attr *attr, struct fid_av **out, void *context);
void face_av_done(struct face_av *av, fi_addr_t address);
/* What the device lets a peer do that with, by its key; NULL: it refuses. */
const struct face_mr *face_mr_find(const struct face_domain *domain, uint64_t key, uint64_t address,
                                   uint64_t length, uint64_t access);
/* Where the bytes of that address are. */
uint8_t *face_mr_bytes(const struct face_mr *mr, uint64_t address);
int face_mr_reg(struct fid *domain, const void *buf, size_t length, uint64_t access, uint64_t offset,
                uint64_t key, uint64_t flags, struct fid_mr **out, void *context);
int face_mr_regattr(struct fid *domain, const struct fi_mr_attr *attr, uint64_t flags, struct fid_mr **out);

#endif
