package explain

import (
	"cmp"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/version"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// tokens is the first version whose kubelets can give a credential provider tokens of Pods' ServiceAccounts, as the scope Namespace
// needs.
var tokens = version.MustParseGeneric("1.34")

// byNode follows the credentials of a resource to the node cache of the Pod's node; zero where the resource does not ask for that.
func (j *judge) byNode(r *v1alpha1.ImagePullSecret, found *Resource, held dockerconfig.Config, c *Container, failing bool) verdict {
	scope := cmp.Or(j.rendered[r.UID].Kubelet, r.Spec.Target.KubeletScope())
	if scope == "" {
		return verdict{}
	}
	served, v := j.cached(r, scope, found, held, c.Image)
	found.Kubelet = &Kubelet{Scope: scope, Served: served, Why: printable(v.why)}
	if served != Yes || !failing {
		return v
	}
	v.next = "the kubelet tries again within five minutes; if that fails, too, " + v.next
	switch failureOf(c) {
	case CauseRefused:
		v.why += "; the registry refuses the pull: either the kubelet does not ask for them, or the registry refuses them"
		v.next += "; if it does ask, try the credentials of the sources of ImagePullSecret " + r.Name + " by hand"
	case CauseImageNotFound:
		v.why += "; the registry says that there is no such image, as some do to whoever has no right to it"
	case CauseLimited:
		v.why += "; the registry limits how many are pulled, most of all without credentials"
	default:
	}
	return v
}

// cached reports whether the node cache has credentials of a resource for the Pod, as its agent decides (pkg/sync/node/cache.go).
func (j *judge) cached(r *v1alpha1.ImagePullSecret, scope v1alpha1.KubeletScope, found *Resource, held dockerconfig.Config, image string) (Answer, verdict) {
	rendered, visible := j.rendered[r.UID]
	node, namespace, whom := "node "+j.pod.Spec.NodeName, "namespace "+j.pod.Namespace, "every Pod of the node"
	unknown := func(why string) (Answer, verdict) { return Unknown, verdict{why: why} }
	no := func(cause Cause, why, next string) (Answer, verdict) { return No, verdict{cause, why, next} }
	switch {
	case r.DeletionTimestamp != nil:
		return no(CauseNotDelivering, "it is being deleted", "")
	case !visible:
		return unknown("what kubelets are served of it is not known")
	case rendered.Kubelet == "":
		return no(CauseNotDelivering, "spec.target.kubelet is not in force yet: "+cmp.Or(r.Status.Reason, "no coordinator has dealt with it"), "")
	}
	if scope == v1alpha1.KubeletScopeNamespace {
		whom = "Pods of " + namespace
		selected := j.selectsHere(r, rendered)
		switch {
		case selected == No:
			return no(CauseNotSelected, "for kubelets neither "+namespace+" itself nor a Pod of it on this node is selected", "")
		case j.excluded.Matches(j.pod.Namespace):
			return no(CauseExcluded, "--excluded-namespaces excludes "+namespace, "")
		case j.pod.Spec.ServiceAccountName == "":
			return no("", "the Pod has no ServiceAccount, as static ones have none, so that its kubelet has no token to ask with", "")
		case selected == Unknown:
			return unknown("whether " + namespace + " is selected for kubelets is not known")
		case found.SecretState == SecretAbsent && j.untold(r) != "":
			return unknown("whether kubelets are served is not known: " + j.untold(r))
		}
	}
	report := j.node.report
	switch {
	case j.pod.Spec.NodeName == "":
		return unknown("no node has the Pod yet, whose kubelet may be served")
	case !j.node.seen:
		return unknown("whether " + node + " serves its kubelet is not known")
	case report == nil:
		return no(CauseNodeNotServing, node+" serves nothing to its kubelet: no agent reports from it",
			"see that the chart's DaemonSet has a Pod on "+node+", and that --namespace is the one that imps runs in")
	case report.Kubelet == nil:
		return no(CauseNodeNotServing, node+" serves nothing to its kubelet: its agent runs without --node-cache-dir", "set the chart's value nodeCache.enabled")
	case report.Kubelet.Problem != "":
		return no(CauseNodeNotServing, node+" may serve nothing to its kubelet: its agent says: "+report.Kubelet.Problem, "see to that on "+node+"; its agent goes on trying")
	}
	if scope == v1alpha1.KubeletScopeNamespace {
		kubelet, err := version.ParseGeneric(j.node.kubelet)
		switch {
		case err != nil:
			return unknown("whether the kubelet of " + node + " is of 1.34 or later, as the scope Namespace needs, is not known")
		case kubelet.LessThan(tokens):
			return no(CauseNodeNotServing, "the kubelet of "+node+" is "+j.node.kubelet+": before 1.34 they have no tokens for imps-credprovider, and without these the scope Namespace serves nothing",
				"bring "+node+" to 1.34")
		}
	}
	keys := keysFor(held, image)
	elder := j.elder(r, scope, keys, image)
	switch {
	case len(keys) == 0:
		return no("", "kubelets are served no credentials that are tokens alone, as these are", "")
	case elder != "":
		return no("", "kubelets are served those of ImagePullSecret "+elder+" instead, which is older", "")
	case j.expired(found):
		return No, expired(r, found)
	}
	return Yes, verdict{
		CauseNodeProvider,
		"the agent of " + node + " says that its node cache is up to date, which then has these credentials for " + whom + "; whether the kubelet asks imps-credprovider for them cannot be seen from here",
		"see on " + node + " that the kubelet runs with an --image-credential-provider-config that names imps-credprovider; its metrics kubelet_credential_provider_plugin_duration and kubelet_credential_provider_plugin_errors_total tell whether it asks, and in vain",
	}
}

// selectsHere reports whether a resource selects the Pod's namespace for the kubelet of its node: Pods of other nodes do not count.
func (j *judge) selectsHere(r *v1alpha1.ImagePullSecret, rendered impsync.Rendered) Answer {
	if j.node.report != nil && slices.Contains(j.node.report.Demand[j.pod.Namespace], r.UID) {
		return Yes
	}
	here := *j.facts
	here.neighbours, here.seesPods = []metav1.ObjectMeta{j.pod.ObjectMeta}, j.node.seen
	selected, _ := (&judge{facts: &here}).selectedBy(rendered.Namespaces, rendered.Pods)
	return selected
}

// elder is an older resource whose credentials the node cache has in place of those under these keys, of which each is there once.
func (j *judge) elder(r *v1alpha1.ImagePullSecret, scope v1alpha1.KubeletScope, keys []string, image string) string {
	for i := range j.candidates {
		other := &j.candidates[i]
		rendered := j.rendered[other.UID]
		if other.UID == r.UID || rendered.Kubelet != scope || impsync.RefOf(other).Compare(impsync.RefOf(r)) > 0 ||
			scope == v1alpha1.KubeletScopeNamespace && j.selectsHere(other, rendered) != Yes {
			continue
		}
		theirs, _ := rendered.Target.Credentials() // of what cannot be read there are none
		if has := keysFor(theirs, image); !slices.ContainsFunc(keys, func(key string) bool { return !slices.Contains(has, key) }) {
			return other.Name
		}
	}
	return ""
}

// keysFor are the keys under which the node cache has credentials for an image: kubelets take no mere tokens from a provider.
func keysFor(config dockerconfig.Config, image string) (keys []string) {
	entries, _ := config.Match(image) // of what is no image there are none
	for _, e := range entries {
		if key, err := dockerconfig.Normalize(e.Key.Reveal()); err == nil && (!e.Username.IsZero() || !e.Password.IsZero()) {
			keys = append(keys, key)
		}
	}
	return keys
}

// join is the verdict on a resource whose credentials come by its Secret, by the node, or by neither: where they got further
// counts, and the other is told. Where there is nothing to do on the node, the Secret counts.
func join(secret, node verdict) verdict {
	switch {
	case node.why == "", node.cause == secret.cause, !further(CauseExpired, secret.cause):
		return secret // there is nothing to add, or the Secret brings them
	case node.cause == CauseExpired:
		return node // wherever they are
	case node.next != "" && further(node.cause, secret.cause):
		return verdict{node.cause, node.why + "; by its Secret they do not come: " + secret.why, node.next + "; or " + secret.next}
	case node.next != "":
		secret.next += "; or " + node.next
	}
	secret.why += "; " + node.why
	return secret
}

// further reports whether credentials that a cause is about got further than those of another.
func further(a, b Cause) bool { return slices.Index(way, a) > slices.Index(way, b) }
