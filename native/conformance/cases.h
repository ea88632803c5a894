/* SPDX-License-Identifier: Apache-2.0 */
/* All cases, in the order in which they run. */
#ifndef TFD_CONFORMANCE_CASES_H
#define TFD_CONFORMANCE_CASES_H

#define CONFORMANCE_CASES(X)                                                                          \
	X(open_unknown, "a rail that does not exist is refused with a sentence that names it")        \
	X(open_info, "what a rail says of itself is in range, and the same for both ends")            \
	X(open_cycles, "rails opened and closed again leave no fd and no thread")                     \
	X(memory_keys, "registrations have keys of their own, and closing them leaves nothing")       \
	X(memory_lengths, "any length can be registered, to its last byte, or is refused")            \
	X(memory_dmabuf, "a dma-buf, which is mapped nowhere, is written to, written from and read")  \
	X(connect_orders, "halves may be started in either order, and late")                          \
	X(connect_both_ways, "connections both ways, and answers by incoming halves")                 \
	X(connect_truncated, "an address cut anywhere is refused, and its half can be closed")        \
	X(connect_garbage, "random bytes for an address do no harm")                                  \
	X(connect_cycles, "connections made, used and closed 200 times leave no fd")                  \
	X(connect_many, "64 connections at once, and whose each immediate is")                        \
	X(write_lengths, "writes of all lengths up to the largest land whole and nowhere else")       \
	X(write_largest, "a message of the largest size goes; of one byte more is refused")           \
	X(write_flood, "posts until the rail is full: each is told once, all have landed")            \
	X(write_parts, "a post of many parts is one")                                                 \
	X(read_lengths, "reads of all lengths, and of nothing")                                       \
	X(read_beside_writes, "reads and writes on one half, each told once")                         \
	X(imm_alone, "immediates without bytes, of any value")                                        \
	X(imm_after_data, "an immediate is told when the bytes of its write are there")               \
	X(imm_after_earlier, "and, on ordered rails, those of earlier writes of its channel")         \
	X(imm_unpolled, "so many immediates as imm_depth says wait to be polled, and none is lost")   \
	X(refuse_key, "a wrong key is refused, harms its own half alone, and nothing lands")          \
	X(refuse_bounds, "so is what reaches beyond the registered memory")                           \
	X(refuse_right, "so is a write to memory that may only be read")                              \
	X(refuse_closed, "so is what names memory that is no longer registered")                      \
	X(close_incoming, "once an incoming half is closed no byte lands by it")                      \
	X(close_outgoing, "once an outgoing half is closed its memory is used no more")               \
	X(close_reading, "once a half that reads is closed no byte lands by it")                      \
	X(close_counts, "what was acknowledged before an incoming half closed has been told there")   \
	X(close_far_half, "posts to a far half that is closed end, or go nowhere")                    \
	X(close_far_rail, "so do posts to a rail that is closed")                                     \
	X(close_joining, "a half is closed while a far one is about to connect to it")                \
	X(close_strangers, "so it is while strangers are connected to whatever listens")              \
	X(close_orders, "halves, memory and rails may be closed in any order that provider.h allows") \
	X(far_never_started, "a far half that is never started hangs nobody")                         \
	X(sleep_idle, "the wait fd is quiet while nothing happens")                                   \
	X(sleep_exchange, "two workers that sleep by the wait fd wake each other")                    \
	X(threads_beside, "memory is registered while workers post")

#define AS_PROTOTYPE(name, text) void case_##name(void);
CONFORMANCE_CASES(AS_PROTOTYPE)
#undef AS_PROTOTYPE

#endif
