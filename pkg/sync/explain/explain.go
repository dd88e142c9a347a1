// Package explain finds out why a Pod pulls, or does not: for each image, which ImagePullSecret has credentials for it, and
// where on the way from there to the kubelet they got stuck. It only reads, with the rights of whoever asks.
package explain

import (
	"time"

	"k8s.io/client-go/rest"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// Config is what Pod needs.
type Config struct {
	// Namespace holds the reports of nodes.
	Namespace string
	// RenderedNamespace holds the rendered Secrets, which say what each resource has credentials for.
	RenderedNamespace string
	// Excluded namespaces are never selected.
	Excluded impsync.Exclusion
	// Client is the connection to the API server, with the rights of whoever asks.
	Client *rest.Config
}

// Result is what is known of a Pod. It holds no credential.
type Result struct {
	Namespace      string `json:"namespace"`
	Pod            string `json:"pod"`
	Node           string `json:"node,omitempty"`
	ServiceAccount string `json:"serviceAccount"`
	// Containers are those of the spec in its order, init containers first.
	Containers []Container `json:"containers"`
	// Unknown is what the caller may not see, and what is not known for that reason.
	Unknown []string `json:"unknown"`
}

// Container is one container and what becomes of its image.
type Container struct {
	Name  string `json:"name"`
	Image string `json:"image"`
	// Repository is what the kubelet looks for credentials for; empty where the image is none.
	Repository string `json:"repository,omitempty"`
	// State is Running, Terminated, or why it waits.
	State string `json:"state"`
	Cause Cause  `json:"cause"`
	// Why says it in a sentence, and Next what to do.
	Why  string `json:"why"`
	Next string `json:"next"`
	// Error is the kubelet's last error about the image, and ErrorTime when it last occurred.
	Error     string     `json:"error,omitempty"`
	ErrorTime *time.Time `json:"errorTime,omitempty"`
	// unknownError: the kubelet says only that it waits.
	unknownError bool
	// Resources are those that have credentials for the image, or may have, the one that Cause is about first.
	Resources []Resource `json:"resources"`
}

// Resource is an ImagePullSecret that has credentials for an image, and how far they got.
type Resource struct {
	Name  string `json:"name"`
	Cause Cause  `json:"cause"`
	Why   string `json:"why"`
	Next  string `json:"next"`
	// Holds says whether it has credentials for the image.
	Holds Answer `json:"holds"`
	// Selected says whether it selects the Pod's namespace, and SelectedBy which kinds of selector do: name, label,
	// annotation, pods.
	Selected   Answer   `json:"selected"`
	SelectedBy []string `json:"selectedBy"`
	// Secret is the name of its Secret, and SecretState what is in the Pod's namespace.
	Secret      string      `json:"secret"`
	SecretState SecretState `json:"secretState"`
	// PodNames and AccountNames say whether the Pod names the Secret, and its ServiceAccount; AttachedAt is when imps had the
	// latter name it.
	PodNames     bool       `json:"podNames"`
	AccountNames Answer     `json:"accountNames"`
	AttachedAt   *time.Time `json:"attachedAt,omitempty"`
	// Expires is when its credentials for the image expire, if they do.
	Expires *time.Time `json:"expires,omitempty"`
	// Kubelet says what becomes of spec.target.kubelet; it is absent where the resource does not have that, or cannot be listed.
	Kubelet *Kubelet `json:"kubelet,omitempty"`
}

// Kubelet says whether the credentials are where the kubelet of the Pod's node gets them for it without a Secret.
type Kubelet struct {
	// Scope is which Pods they are for: Namespace, those of the selected namespaces; Node, every Pod of the node.
	Scope v1alpha1.KubeletScope `json:"scope"`
	// Served says whether the node cache has them for the Pod, and Why; whether the kubelet asks for them is not to be seen.
	Served Answer `json:"served"`
	Why    string `json:"why"`
}

// Answer is yes, no, or unknown.
type Answer string

// Answers.
const (
	Yes     Answer = "yes"
	No      Answer = "no"
	Unknown Answer = "unknown"
)

func answer(yes bool) Answer {
	if yes {
		return Yes
	}
	return No
}

// SecretState is what there is of a resource's Secret in a namespace.
type SecretState string

// States of Secrets.
const (
	// SecretCurrent: it holds what the resource delivers. SecretPresent: it is imps's, and what it should hold is not to be seen.
	SecretCurrent SecretState = "current"
	SecretPresent SecretState = "present"
	// SecretStale: it holds something else.
	SecretStale SecretState = "stale"
	// SecretAbsent: there is none of that name.
	SecretAbsent SecretState = "absent"
	// SecretForeign: there is one that is not imps's.
	SecretForeign SecretState = "foreign"
	// SecretClaimed: it is of an older resource that selects the namespace, too.
	SecretClaimed SecretState = "claimed"
	// SecretUnknown: the caller may not read it.
	SecretUnknown SecretState = "unknown"
)

// Cause is why an image is pulled, or is not.
type Cause string

// Causes of an image.
const (
	CausePulled       Cause = "Pulled"              // the container has run, so the image is on the node
	CauseFinished     Cause = "Finished"            // the Pod has run, or is going
	CauseNotScheduled Cause = "NotScheduled"        // no node has the Pod yet
	CauseWaiting      Cause = "Waiting"             // no pull has failed so far
	CauseInvalidImage Cause = "InvalidImage"        // it is no image reference
	CauseNeverPull    Cause = "NeverPull"           // imagePullPolicy forbids it
	CauseUnreachable  Cause = "RegistryUnreachable" // credentials would not help
	CauseNotInstalled Cause = "NotInstalled"        // there is no imps in the cluster
	CauseNoResource   Cause = "NoResource"          // no ImagePullSecret has credentials for it
	CauseUnknown      Cause = "Unknown"             // the caller may not see enough
)

// Causes of a resource, in the order of the way: the later, the further its credentials got.
const (
	CauseNotDelivering  Cause = "NotDelivering"  // it delivers nothing
	CauseNotSelected    Cause = "NotSelected"    // it does not select the namespace
	CauseExcluded       Cause = "Excluded"       // the installation excludes the namespace
	CauseClaimed        Cause = "OlderResource"  // an older resource claims the Secret, too
	CauseForeign        Cause = "ForeignSecret"  // the Secret is not imps's
	CauseNoSecret       Cause = "SecretMissing"  // it is not there
	CauseStale          Cause = "SecretStale"    // it is not what is to be delivered
	CauseNotNamed       Cause = "NotNamed"       // neither the Pod nor its ServiceAccount names it
	CauseNotAttached    Cause = "NotAttached"    // the ServiceAccount is to name it, and does not
	CauseOwnPullSecrets Cause = "OwnPullSecrets" // the Pod names others, so that the ServiceAccount's do not count
	CauseNodeNotServing Cause = "NodeNotServing" // the node's kubelet is to have them, and the node serves none
	CauseAttachedLate   Cause = "AttachedLate"   // the Pod came before the ServiceAccount named it
	CauseNameRemoved    Cause = "NameRemoved"    // the Pod came after, and does not name it all the same
	CauseExpired        Cause = "TokenExpired"   // the credentials have expired
	CauseTemplateNewer  Cause = "TemplateNewer"  // the template names it by now, and the Pod is of before
	CauseNodeProvider   Cause = "NodeProvider"   // the node cache has them for the Pod, and its Secret does not bring them
	CauseBackOff        Cause = "BackOff"        // all is there, and the kubelet tries again
	CauseRefused        Cause = "Refused"        // the registry refuses the credentials
	CauseImageNotFound  Cause = "ImageNotFound"  // the registry says that there is no such image
	CauseLimited        Cause = "RateLimited"    // the registry limits how many are pulled
	CausePullFailed     Cause = "PullFailed"     // something else, which the kubelet's error tells
	CauseServed         Cause = "Served"         // nothing is missing, and nothing has failed
)

// way is the order of a resource's causes.
var way = []Cause{
	CauseNotDelivering, CauseNotSelected, CauseExcluded, CauseClaimed, CauseForeign, CauseNoSecret, CauseStale, CauseNotNamed,
	CauseNotAttached, CauseOwnPullSecrets, CauseNodeNotServing, CauseAttachedLate, CauseTemplateNewer, CauseNameRemoved, CauseExpired,
	CauseNodeProvider, CauseBackOff, CauseRefused, CauseImageNotFound, CauseLimited, CausePullFailed, CauseServed,
}
