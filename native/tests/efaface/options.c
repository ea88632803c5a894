/* SPDX-License-Identifier: Apache-2.0 */
/* Options of endpoints of EFA's face: what is emulated, and which writes the processor copies. */
#include "face.h"

#define OPT_EMULATED_READ (-(0xefa << 16) + 1)
#define OPT_EMULATED_WRITE (-(0xefa << 16) + 2)
#define OPT_INJECT_RMA_SIZE 18
#define RDMA_BY_DEFAULT                                                                                \
	FI_VERSION(1, 18) /* API: before it, fabric efa emulates on devices of the first generation */

int face_ep_getopt(fid_t fid, int level, int name, void *value, size_t *bytes)
{
	const struct face_fabric *fabric = ((struct face_ep *)fid)->domain->fabric;

	if (level != FI_OPT_ENDPOINT || (name != OPT_EMULATED_READ && name != OPT_EMULATED_WRITE))
		return -FI_ENOPROTOOPT;
	if (*bytes < sizeof(bool))
		return -FI_ETOOSMALL;
	*bytes = sizeof(bool);
	*(bool *)value = !fabric->direct &&
	                 (face_control.emulated || FI_VERSION_LT(fabric->api_version, RDMA_BY_DEFAULT));
	return 0;
}

int face_ep_setopt(fid_t fid, int level, int name, const void *value, size_t bytes)
{
	struct face_ep *ep = (struct face_ep *)fid;

	if (level != FI_OPT_ENDPOINT || name != OPT_INJECT_RMA_SIZE || face_control.stubborn)
		return -FI_ENOPROTOOPT;
	if (bytes != sizeof(ep->inject) || *(const size_t *)value > ep->inject)
		return -FI_EINVAL;
	ep->inject = *(const size_t *)value;
	return 0;
}
