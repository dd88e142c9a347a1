package sync

import (
	"strings"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// FieldManager is the field manager of everything that imps writes. Coordinator and
// agents share it, so that one may change what the other created.
const FieldManager = "imps-node"

// Labels and annotations.
const (
	// LabelOwnerUID is on every target Secret: the UID of its ImagePullSecret. It is
	// banzaicloud/imps's label, with its meaning.
	LabelOwnerUID = "images.banzaicloud.io/owner-uid"

	// AnnotationRevision is on every target Secret: "<resource uid>.<counter>".
	AnnotationRevision = "images.banzaicloud.io/revision"

	// AnnotationLegacyApplied is what banzaicloud/imps leaves on its Secrets. It holds
	// the credentials in clear, and is removed when such a Secret is adopted.
	AnnotationLegacyApplied = "banzaicloud.com/last-applied"

	// AnnotationAttached is on every ServiceAccount that imps has had name a pull Secret: the names that it has added,
	// separated by commas.
	AnnotationAttached = "images.banzaicloud.io/attached"

	// AnnotationAttachedAt is when imps has last added a name there, in RFC 3339.
	AnnotationAttachedAt = "images.banzaicloud.io/attached-at"

	// LabelComponent marks imps's own objects; ComponentReport is a node report.
	LabelComponent  = "images.banzaicloud.io/component"
	ComponentReport = "node-report"
)

// Types of imps's own Secrets.
const (
	RenderedType = "images.banzaicloud.io/rendered"
	StateType    = "images.banzaicloud.io/state"
)

// Resources that both duties use.
var (
	SecretResource         = schema.GroupVersionResource{Version: "v1", Resource: "secrets"}
	NamespaceResource      = schema.GroupVersionResource{Version: "v1", Resource: "namespaces"}
	ServiceAccountResource = schema.GroupVersionResource{Version: "v1", Resource: "serviceaccounts"}
	NodeResource           = schema.GroupVersionResource{Version: "v1", Resource: "nodes"}
)

// RenderedName is the name of the rendered Secret of the resource with this UID.
func RenderedName(uid types.UID) string { return "imps-rendered-" + string(uid) }

// UIDOfRendered is the UID of the resource whose rendered Secret has this name.
func UIDOfRendered(name string) types.UID {
	return types.UID(strings.TrimPrefix(name, RenderedName("")))
}

// StateName is the name of the state Secret of the resource with this UID.
func StateName(uid types.UID) string { return "imps-state-" + string(uid) }

// ReportName is the name of the report of this node.
func ReportName(node string) string { return "imps-node-" + node }
