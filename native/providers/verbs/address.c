/* SPDX-License-Identifier: Apache-2.0 */
#include "address.h"

#include <errno.h>
#include <string.h>

#include "../../core/parts.h"

#define BITS_24 0xffffffu
#define NUMBER_LEAST 2u /* 0 and 1 are those of the subnet's management */

static const char *link_layer_text(uint32_t link_layer)
{
	return link_layer == IBV_LINK_LAYER_ETHERNET   ? "RoCE" :
	       link_layer == IBV_LINK_LAYER_INFINIBAND ? "InfiniBand" :
	                                                 "neither RoCE nor InfiniBand";
}

static int check_queues(const struct tfd_verbs_address *address, struct tfd_error *error)
{
	for (uint32_t i = 0; i < TFD_VERBS_CHANNELS; i++) {
		if (address->numbers[i] < NUMBER_LEAST || address->numbers[i] > BITS_24)
			return tfd_fail(error, -EPROTO, "queue pair %u of the peer has number 0x%x", i,
			                address->numbers[i]);
		if (address->psns[i] > BITS_24)
			return tfd_fail(error, -EPROTO, "queue pair %u of the peer begins with packet 0x%x",
			                i, address->psns[i]);
		for (uint32_t j = 0; j < i; j++) {
			if (address->numbers[i] == address->numbers[j])
				return tfd_fail(error, -EPROTO,
				                "queue pairs %u and %u of the peer are both 0x%x", j, i,
				                address->numbers[i]);
		}
	}
	return 0;
}

int tfd_verbs_address_check(const struct tfd_verbs_port *port, const void *bytes, size_t count,
                            struct tfd_verbs_address *out, struct tfd_error *error)
{
	static const uint8_t nobody[16];
	struct tfd_verbs_address address;
	int rc;

	if (count != sizeof(address))
		return tfd_fail(error, -EPROTO, "a verbs address has %zu bytes, not %zu", sizeof(address),
		                count);
	memcpy(&address, bytes, sizeof(address));
	if (address.magic != TFD_VERBS_MAGIC || address._pad || address._pad2)
		return tfd_fail(error, -EPROTO,
		                "the far half's address is not of verbs, or of another version (0x%08x, not "
		                "0x%08x): use one version of transferd on both hosts",
		                address.magic, TFD_VERBS_MAGIC);
	if (address.link_layer != port->link_layer)
		return tfd_fail(error, -EPROTO, "the peer's rail is %s, this one %s: join rails of one kind",
		                link_layer_text(address.link_layer), link_layer_text(port->link_layer));
	if (address.mtu < IBV_MTU_256 || address.mtu > IBV_MTU_4096)
		return tfd_fail(error, -EPROTO, "the peer's MTU is number %u; 1 to 5 are known", address.mtu);
	if (!address.reads) /* by which a connection is proven */
		return tfd_fail(error, -EPROTO,
		                "the peer's device answers no RDMA reads: use another provider");
	if (port->link_layer == IBV_LINK_LAYER_INFINIBAND && !port->global && !address.lid)
		return tfd_fail(error, -EPROTO,
		                "the peer's InfiniBand port has no LID: is a subnet manager up?");
	if ((port->global || port->link_layer == IBV_LINK_LAYER_ETHERNET) &&
	    (memcmp(address.gid, nobody, sizeof(nobody)) == 0 || address.gid[0] == 0xff))
		return tfd_fail(error, -EPROTO, "the peer's GID is %s: no packet goes there",
		                address.gid[0] ? "a multicast one" : "zero");
	rc = check_queues(&address, error);
	if (!rc)
		*out = address;
	return rc;
}
