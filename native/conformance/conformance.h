/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What every provider has to do, whatever its NIC: cases that know provider.h alone. A case runs in a process of its own, so that one that
 * crashes or hangs is one failure; it opens a rig, two rails with memory, and lets it watch over what holds everywhere:
 * each posted piece is told of once, at the latest when its half is closed and drained.
 */
#ifndef TFD_CONFORMANCE_H
#define TFD_CONFORMANCE_H

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "core/parts.h"
#include "providers/provider.h"

/* ---- outcome: one case's end, in memory that the parent sees ---- */

enum outcome_state { OUTCOME_NONE, OUTCOME_OK, OUTCOME_SKIPPED, OUTCOME_FAILED };

struct outcome {
	uint32_t state;
	uint32_t line; /* reached last, with `file`; of a case that crashed or hung they tell where */
	const char *file; /* a literal, which the parent has, too */
	char text[512]; /* why it failed or was skipped, or a remark on what was seen */
};

extern struct outcome *outcome;

void outcome_at(const char *file, int line);
_Noreturn void outcome_fail(const char *file, int line, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
_Noreturn void outcome_skip(const char *format, ...) __attribute__((format(printf, 1, 2)));
void outcome_remark(const char *format, ...) __attribute__((format(printf, 1, 2)));

#define FAIL(...) outcome_fail(__FILE__, __LINE__, __VA_ARGS__)
#define CHECK(condition)                                \
	do {                                            \
		outcome_at(__FILE__, __LINE__);         \
		if (!(condition))                       \
			FAIL("not so: %s", #condition); \
	} while (0)
#define CHECK_OK(call)                                                               \
	do {                                                                         \
		int check_rc;                                                        \
		outcome_at(__FILE__, __LINE__);                                      \
		check_rc = (call);                                                   \
		if (check_rc != 0)                                                   \
			FAIL("%s: %s (%s)", #call, strerror(-check_rc), error.text); \
	} while (0)

/* ---- what is tested ---- */

struct settings {
	const struct tfd_provider_ops *ops;
	struct tfd_group_options options; /* of both rails */
	const char *rails[2]; /* the near and the far one, perhaps the same */
	bool device; /* memory is that of a GPU, as far as the rail is told (staged) */
	unsigned load; /* per cent of the usual numbers: less on hosts that are emulated */
};

extern struct settings settings;
extern struct tfd_error error;

/* So many of `usual`, at least 1. */
uint32_t load(uint32_t usual);

/* ---- rig ---- */

#define PAGE_BYTES 4096u
#define MEMORY_BYTES ((8u << 20) + (64u << 10)) /* registered, of each side */
#define GUARD 0xe7 /* what is in the pages before and behind it, which are not */
#define PIECES 4096u /* as many as a worker ever has posted */
#define PATIENCE_NS 10000000000ull /* without any progress */

struct device; /* device.c */

struct side {
	struct tfd_domain *domain;
	struct device *device; /* owned; NULL: its memory is the host's */
	struct tfd_rail_info info;
	uint8_t *memory; /* owned; a page into its mapping */
	struct tfd_mr *mr;
	struct tfd_region_key key;
};

enum piece_state { PIECE_FREE, PIECE_POSTED, PIECE_TOLD };

/* A posted piece. `wr` is first: the provider hands that back. */
struct piece {
	struct tfd_wr wr;
	struct tfd_half *half;
	struct tfd_post post; /* its parts are the case's own */
	uint64_t number; /* a case's own */
	uint32_t state;
	bool kept; /* the case looks at it and gives it back */
	int error; /* positive, of one that failed */
	bool refused; /* told as the far side's refusal */
};

struct arrival {
	uint32_t imm;
	uint32_t order;
	void *owner;
	uint32_t side; /* of the rail that told it */
};

struct rig {
	const struct tfd_provider_ops *ops;
	struct side sides[2];
	bool one_domain; /* both sides are one rail */
	bool faults; /* the case makes some: errors of a rail's own are no failure */
	struct piece *pieces;
	uint32_t piece_free[PIECES];
	uint32_t piece_free_count;
	uint32_t in_flight;
	uint64_t sent, failed, refused; /* told */
	uint64_t domain_errors;
	struct arrival *arrivals;
	uint32_t arrival_count, arrival_capacity;
	/* Called when they are told, so that what has to be visible then is looked at then. NULL: nobody. */
	void (*on_imm)(struct rig *rig, const struct arrival *arrival);
	void (*on_sent)(struct rig *rig, const struct piece *piece);
	void *context;
};

struct rig *rig_open(void);
/* All pieces must have been told of. Looks at the guards. */
void rig_close(struct rig *rig);
/* What the rail of a side has told. */
void rig_take(struct rig *rig, uint32_t side, const struct tfd_wc *wc);
/* Polls; how much was told. `sides`: bits. */
uint32_t rig_poll(struct rig *rig, uint32_t sides);
/* Polls both sides, and yields if nothing was told. */
uint32_t rig_pass(struct rig *rig);
/* Until nothing has been told for a while. */
void rig_settle(struct rig *rig);
/* What can land anywhere has to be in its place: guards are looked at. */
void rig_guards(const struct rig *rig);

struct patience {
	uint64_t since_ns;
};
struct patience patience_begin(void);
/* One pass; false: nothing has been told for too long. */
bool patience_pass(struct rig *rig, struct patience *patience);

#define AWAIT(rig, condition)                                            \
	do {                                                             \
		struct patience await_patience = patience_begin();       \
		outcome_at(__FILE__, __LINE__);                          \
		while (!(condition)) {                                   \
			if (!patience_pass(rig, &await_patience))        \
				FAIL("awaited in vain: %s", #condition); \
		}                                                        \
	} while (0)

/* ---- memory of a GPU (staged), which a thread in place of its helper copies ---- */

/* Registers the side's memory so. */
void device_open(struct side *side);
/* Before its rail is closed. */
void device_close(struct side *side);

/* ---- pairs of halves ---- */

struct half_end {
	struct tfd_half *half;
	uint8_t address[TFD_ADDRESS_MAX];
	size_t address_bytes;
	uint32_t side;
	int owner; /* its address is the half's owner */
};

/* Both halves of a connection. Not to be moved. */
struct pair {
	struct side *from, *to; /* of the writer, and where its writes land */
	struct half_end out, in;
};

/* `from`: which side writes. */
void pair_make(struct rig *rig, struct pair *pair, uint32_t from);
void pair_start(struct rig *rig, struct pair *pair);
void pair_open(struct rig *rig, struct pair *pair, uint32_t from);
/* Closes, drains and frees it; by then all that was posted by it has been told. Idempotent. */
void half_end(struct rig *rig, struct half_end *end);
void pair_close(struct rig *rig, struct pair *pair);

/* Whether an immediate that came names the half that it came by, or nobody where that is allowed. */
bool owned_by(const struct rig *rig, const struct arrival *arrival, const struct half_end *end);

/* ---- posting ---- */

struct tfd_post post_write(const struct pair *pair, uint64_t from_offset, uint64_t to_offset,
                           uint64_t length);
/* -EAGAIN and what breaks a connection are the caller's. */
struct piece *rig_try(struct rig *rig, struct tfd_half *half, const struct tfd_post *post, int *rc);
/* Posts when there is room. Keeps the piece: piece_give. */
struct piece *rig_post(struct rig *rig, struct tfd_half *half, const struct tfd_post *post);
/* The same, forgotten when it is told. */
void rig_send(struct rig *rig, struct tfd_half *half, const struct tfd_post *post);
void piece_give(struct rig *rig, struct piece *piece);
/* Posts, waits until it is told, and says how: 0, or a positive errno. */
int rig_run(struct rig *rig, struct tfd_half *half, const struct tfd_post *post, bool *refused);
/* A write that has to work, its bytes and, if so asked, its immediate looked at. */
void rig_write(struct rig *rig, struct pair *pair, uint64_t length, const uint32_t *imm);

/* ---- bytes ---- */

void pattern_fill(uint8_t *bytes, uint64_t length, uint64_t seed);
bool pattern_is(const uint8_t *bytes, uint64_t length, uint64_t seed);
bool all_are(const uint8_t *bytes, uint64_t length, uint8_t value);
uint64_t mix(uint64_t seed); /* a number that looks random */

/* ---- what the process holds ---- */

uint32_t count_fds(void);
uint32_t count_threads(void);

#endif
