/* SPDX-License-Identifier: Apache-2.0 */
/* What a half tells its far half, by the peer service. */
#ifndef TFD_VERBS_ADDRESS_H
#define TFD_VERBS_ADDRESS_H

#include "verbs.h"

#define TFD_VERBS_MAGIC 0x31766674u /* "tfv1" */

struct tfd_verbs_address {
	uint32_t magic;
	uint8_t link_layer; /* IBV_LINK_LAYER_INFINIBAND or _ETHERNET */
	uint8_t mtu; /* enum ibv_mtu: the most that it takes */
	uint8_t reads; /* that it answers at once, by each queue pair */
	uint8_t _pad;
	uint16_t lid; /* InfiniBand; else 0 */
	uint16_t _pad2;
	uint32_t numbers[TFD_VERBS_CHANNELS]; /* of queue pairs: 24 bits */
	uint32_t psns[TFD_VERBS_CHANNELS]; /* of the first packet of each: 24 bits */
	uint8_t gid[16];
};

_Static_assert(sizeof(struct tfd_verbs_address) == 52, "the wire's");

/* Whether a far half could have told it, and this one, on `port`, reach that. -EPROTO: no; error says why. */
int tfd_verbs_address_check(const struct tfd_verbs_port *port, const void *bytes, size_t count,
                            struct tfd_verbs_address *out, struct tfd_error *error);

#endif
