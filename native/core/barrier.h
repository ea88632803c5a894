/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The only file that spells a memory order. Builtins on plain integers, so that C, C++ and cffi share abi.h.
 * No thread fences: ThreadSanitizer does not understand them.
 *
 *   release store  ->  acquire load     what the storer wrote before is seen by the loader after
 *   seq store then seq load, both sides "sleep or wake": of two parties that each store a flag and then load the
 *                                       other's, at least one sees the other (Dekker)
 */
#ifndef TFD_BARRIER_H
#define TFD_BARRIER_H

#include <stdint.h>

#define tfd_load_relaxed(p) __atomic_load_n((p), __ATOMIC_RELAXED)
#define tfd_store_relaxed(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
#define tfd_load_acquire(p) __atomic_load_n((p), __ATOMIC_ACQUIRE)
#define tfd_store_release(p, v) __atomic_store_n((p), (v), __ATOMIC_RELEASE)
#define tfd_load_seq(p) __atomic_load_n((p), __ATOMIC_SEQ_CST)
#define tfd_store_seq(p, v) __atomic_store_n((p), (v), __ATOMIC_SEQ_CST)
#define tfd_add_seq(p, v) __atomic_fetch_add((p), (v), __ATOMIC_SEQ_CST)
#define tfd_sub_seq(p, v) __atomic_fetch_sub((p), (v), __ATOMIC_SEQ_CST)
#define tfd_add_relaxed(p, v) __atomic_fetch_add((p), (v), __ATOMIC_RELAXED)
#define tfd_or_seq(p, v) __atomic_fetch_or((p), (v), __ATOMIC_SEQ_CST)
#define tfd_swap_seq(p, v) __atomic_exchange_n((p), (v), __ATOMIC_SEQ_CST)
/* Stores v if *p is still *expected, else fills *expected; may fail for no reason. */
#define tfd_replace_seq(p, expected, v)                                                          \
	__atomic_compare_exchange_n((p), (expected), (v), 1, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)

#endif
