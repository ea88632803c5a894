/* SPDX-License-Identifier: Apache-2.0 */
/* What the sources of the double share. */
#ifndef SOFT_H
#define SOFT_H

#include <stdbool.h>
#include <stdint.h>

#include "softcuda.h"

#define SOFT_DEVICES_MAX 8

enum soft_kind {
	SOFT_DEVICE, /* of cuMemAlloc */
	SOFT_IMPORTED, /* of cuIpcOpenMemHandle */
	SOFT_MAPPED, /* a chunk */
	SOFT_HOST, /* registered */
};

/* A range that calls may name. */
struct soft_memory {
	struct soft_memory *next;
	uint64_t address;
	uint64_t bytes;
	uint64_t buffer_id;
	uint64_t chunk; /* MAPPED */
	enum soft_kind kind;
	int device;
	int fd; /* DEVICE; owned */
};

/*
 * Whether a call shall fail, by $SOFTCUDA_FAULTS (README.md): 0, or the CUresult that it is to return. Also of a context that is lost:
 * every call then.
 */
int soft_enter(const char *call);
/* Of one that no lost context keeps from being made. */
int soft_fault(const char *call);
/* Of a lost context: its result; 0: it is none. */
int soft_broken(void);
void soft_break(int result);
/* Microseconds that each copy takes more. */
unsigned soft_slow(void);

int soft_device_count(void);
/* The context that is current, or NULL. */
void *soft_current(void);
int soft_device_of(void *context);

/* memory.c: the table of ranges, under one lock */
uint64_t soft_number(void);
void soft_memory_lock(void);
void soft_memory_unlock(void);
/* Under the lock, as all below. Takes a copy of what is given; NULL: no memory. */
struct soft_memory *soft_memory_add(const struct soft_memory *memory);
struct soft_memory *soft_memory_at(uint64_t address, uint64_t bytes); /* that holds the range, or NULL */
bool soft_memory_remove(uint64_t address, enum soft_kind kind, struct soft_memory *gone);
/* Whether copies may use a range, as `host` memory or as a device's; takes the lock. */
bool soft_may_copy(uint64_t address, uint64_t bytes, bool host);

/* Until no stream has anything to do, as the driver waits in some calls; or the context is lost. */
void soft_settle(void);

#endif
