package explain

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/dockerconfig"
	impsync "github.com/imps-node/imps/pkg/sync"
)

// verdict is what is said of a container or a resource.
type verdict struct {
	cause     Cause
	why, next string
}

func (f *facts) explain(excluded impsync.Exclusion, now time.Time) Result {
	result := Result{
		Namespace: f.pod.Namespace, Pod: f.pod.Name, Node: f.pod.Spec.NodeName, ServiceAccount: f.pod.Spec.ServiceAccountName,
		Containers: []Container{}, Unknown: f.unknown,
	}
	j := &judge{facts: f, excluded: excluded, now: now, candidates: f.resources}
	if !f.listed {
		j.candidates = f.inferred()
	}
	status := f.pod.Status
	for _, c := range f.pod.Spec.InitContainers {
		result.Containers = append(result.Containers, j.container(c.Name, c.Image, status.InitContainerStatuses))
	}
	for _, c := range f.pod.Spec.Containers {
		result.Containers = append(result.Containers, j.container(c.Name, c.Image, status.ContainerStatuses))
	}
	for _, c := range f.pod.Spec.EphemeralContainers {
		result.Containers = append(result.Containers, j.container(c.Name, c.Image, status.EphemeralContainerStatuses))
	}
	return result
}

// inferred are resources that the caller may not list, as far as Secrets tell of them that the Pod or its ServiceAccount names.
func (f *facts) inferred() (resources []v1alpha1.ImagePullSecret) {
	for name, s := range f.secrets {
		if s == nil || s.existing.Ownership == impsync.Foreign {
			continue
		}
		r := v1alpha1.ImagePullSecret{}
		r.Name, r.UID = cmp.Or(s.owner, string(s.existing.OwnerUID)), s.existing.OwnerUID
		r.Spec.Target.Secret.Name = name
		resources = append(resources, r)
	}
	return resources
}

// judge judges one Pod.
type judge struct {
	*facts
	excluded   impsync.Exclusion
	now        time.Time
	candidates []v1alpha1.ImagePullSecret
}

// Reasons for which a container waits, of pkg/kubelet/images/types.go, and of what is not about its image.
const (
	reasonNeverPull = "ErrImageNeverPull"
	reasonInvalid   = "InvalidImageName"
)

var pullReasons = []string{"ErrImagePull", "ImagePullBackOff", reasonNeverPull, reasonInvalid, "ImageInspectError", "RegistryUnavailable", "SignatureValidationFailed"}

// container finds out about one container.
func (j *judge) container(name, image string, statuses []corev1.ContainerStatus) Container {
	c := Container{Name: name, Image: image, State: "Waiting", Resources: []Resource{}}
	var waits *corev1.ContainerStateWaiting
	var ran bool
	if i := slices.IndexFunc(statuses, func(s corev1.ContainerStatus) bool { return s.Name == name }); i >= 0 {
		s := statuses[i]
		waits, ran = s.State.Waiting, s.State.Running != nil || s.State.Terminated != nil
		switch {
		case s.State.Running != nil:
			c.State = "Running"
		case s.State.Terminated != nil:
			c.State = "Terminated"
		case waits != nil:
			c.State = cmp.Or(waits.Reason, c.State)
		}
		ran = ran || s.LastTerminationState.Terminated != nil && !slices.Contains(pullReasons, c.State)
	}
	failing := waits != nil && slices.Contains(pullReasons, waits.Reason)
	if failing {
		c.Error = waits.Message
		if last := j.lastFailure(image); last != nil {
			c.Error = last.message
			if !last.at.IsZero() {
				c.ErrorTime = &last.at
			}
		}
	}
	var err error
	if c.Repository, err = dockerconfig.Repository(image); err == nil {
		c.Resources = j.resourcesFor(&c, failing)
	}
	v := j.judge(&c, ran, failing)
	c.Cause, c.Why, c.Next = v.cause, v.why, v.next
	return c
}

// lastFailure is the last Event about a pull of an image.
func (j *judge) lastFailure(image string) *failure {
	for i := range j.failures {
		if strings.Contains(j.failures[i].message, `"`+image+`"`) {
			return &j.failures[i]
		}
	}
	return nil
}

// judge is the verdict on a container.
func (j *judge) judge(c *Container, ran, failing bool) verdict {
	failed := failureOf(c)
	switch {
	case j.pod.DeletionTimestamp != nil:
		return verdict{CauseFinished, "the Pod is being deleted", "nothing"}
	case j.pod.Status.Phase == corev1.PodSucceeded || j.pod.Status.Phase == corev1.PodFailed:
		return verdict{CauseFinished, "the Pod has come to its end, and pulls nothing any more", "nothing about images; kubectl describe pod tells why it ended"}
	case ran:
		return verdict{CausePulled, "the container has run, so that its image is on the node", "nothing"}
	case c.Repository == "" || c.State == reasonInvalid:
		return verdict{CauseInvalidImage, "what the spec says is no image reference", "correct the image in the Pod's template"}
	case c.State == reasonNeverPull:
		return verdict{CauseNeverPull, "imagePullPolicy is Never, and the image is not on the node", "change imagePullPolicy in the Pod's template"}
	case failing && failed == CauseUnreachable:
		return verdict{CauseUnreachable, "the node cannot reach the registry, or cannot trust it; credentials would not help",
			"check names, routes, proxies and certificates from the node to " + host(c.Repository)}
	case !j.installed && failing:
		return verdict{CauseNotInstalled, "the cluster does not know ImagePullSecrets, so that there are no credentials of imps", "install the chart"}
	}
	best := j.best(c)
	if failing {
		return best
	}
	v := verdict{CauseWaiting, "no pull has failed so far", "kubectl describe pod tells what it waits for"}
	if j.pod.Spec.NodeName == "" {
		v = verdict{CauseNotScheduled, "no node has the Pod yet, so that nothing is pulled", "kubectl describe pod tells why it is not scheduled"}
	}
	if best.cause != CauseServed {
		v.why += "; if the image is private, this is in the way: " + best.why
	}
	return v
}

// best is the verdict on the resource that got furthest.
func (j *judge) best(c *Container) verdict {
	// Of those that have none, one that selects the namespace may be what is meant to.
	broken := slices.IndexFunc(c.Resources, func(r Resource) bool { return r.Cause == CauseNotDelivering && r.Selected == Yes })
	if len(c.Resources) > 0 && c.Resources[0].Holds == Yes && (broken < 0 || c.Resources[0].Selected != No) {
		return verdict{c.Resources[0].Cause, "ImagePullSecret " + c.Resources[0].Name + ": " + c.Resources[0].Why, c.Resources[0].Next}
	}
	if broken >= 0 {
		r := c.Resources[broken]
		return verdict{r.Cause, "ImagePullSecret " + r.Name + " may be meant to have credentials for the image: " + r.Why, r.Next}
	}
	if len(c.Resources) > 0 || !j.listed {
		return verdict{CauseUnknown, "which ImagePullSecrets have credentials for " + host(c.Repository) + " cannot be seen with these rights", "ask somebody who may see what is unknown"}
	}
	return verdict{CauseNoResource, fmt.Sprintf("none of the %d ImagePullSecrets has credentials for %s", len(j.candidates), c.Repository),
		"check the image's name; if it is private, add a source with credentials for " + host(c.Repository) + " to an ImagePullSecret"}
}

func host(repository string) string {
	host, _, _ := strings.Cut(repository, "/")
	return host
}

// failureOf is why the pull of a container's image failed last.
func failureOf(c *Container) Cause {
	if c.State == "RegistryUnavailable" {
		return CauseUnreachable
	}
	switch impsync.PullFailureOf(c.Image, c.Error) {
	case impsync.PullRefused:
		return CauseRefused
	case impsync.PullNotFound:
		return CauseImageNotFound
	case impsync.PullUnreachable:
		return CauseUnreachable
	case impsync.PullOther:
	}
	return CausePullFailed
}

// resourcesFor returns the resources that have credentials for an image, or may have, that which got furthest first.
func (j *judge) resourcesFor(c *Container, failing bool) []Resource {
	found := []Resource{}
	for i := range j.candidates {
		if r := j.resource(&j.candidates[i], c, failing); r.Holds != No {
			found = append(found, r)
		}
	}
	slices.SortFunc(found, func(a, b Resource) int {
		return cmp.Or(strings.Compare(string(b.Holds), string(a.Holds)), // yes before unknown
			cmp.Compare(slices.Index(way, b.Cause), slices.Index(way, a.Cause)), strings.Compare(a.Name, b.Name))
	})
	return found
}

// resource finds out how far the credentials of a resource for an image got.
func (j *judge) resource(r *v1alpha1.ImagePullSecret, c *Container, failing bool) Resource {
	rendered, visible := j.rendered[r.UID]
	found := Resource{Name: r.Name, Secret: r.Spec.Target.Secret.Name, SelectedBy: []string{}}
	if !rendered.Target.IsZero() {
		found.Secret = rendered.Target.Name()
	}
	s, readable := j.secrets[found.Secret]
	held, known := j.held(r, rendered, visible, s)
	found.Selected, found.SelectedBy = j.selects(r, rendered)
	deliversNothing := visible && rendered.Target.IsZero()
	switch {
	case known:
		found.Holds = answer(held.Serves(c.Image))
	case deliversNothing && found.Selected == No:
		found.Holds = No // whatever it is meant to have
	default:
		found.Holds = Unknown
	}
	found.SecretState = j.secretState(r, rendered, s, readable, c.Image)
	found.PodNames = slices.Contains(impsync.PullSecrets(j.pod.Spec.ImagePullSecrets), found.Secret)
	found.AccountNames = Unknown
	if j.account != nil {
		found.AccountNames = answer(slices.Contains(impsync.PullSecrets(j.account.ImagePullSecrets), found.Secret))
		if at := impsync.AttachedAt(j.account); found.AccountNames == Yes && !at.IsZero() {
			found.AttachedAt = &at
		}
	}
	found.Expires = expiry(rendered, held, c.Image)
	v := j.way(r, &found, deliversNothing, s, c, failing)
	found.Cause, found.Why, found.Next = v.cause, v.why, v.next
	return found
}

// held is what a resource has credentials for; false where that cannot be seen.
func (j *judge) held(r *v1alpha1.ImagePullSecret, rendered impsync.Rendered, visible bool, s *secret) (dockerconfig.Config, bool) {
	if visible && !rendered.Target.IsZero() {
		config, err := rendered.Target.Credentials()
		return config, err == nil
	}
	if s != nil && s.existing.OwnerUID == r.UID && s.existing.Ownership != impsync.Foreign && s.err == nil {
		return s.credentials, true
	}
	return dockerconfig.Config{}, false
}

// expiry is when the last of the credentials for an image expires, nil where one does not.
func expiry(rendered impsync.Rendered, held dockerconfig.Config, image string) *time.Time {
	entries, err := held.Match(image)
	if err != nil {
		return nil
	}
	var last *time.Time
	for _, e := range entries {
		at, expires := rendered.Expiries[e.Registry()]
		if !expires {
			return nil
		}
		if last == nil || at.After(*last) {
			last = &at
		}
	}
	return last
}

// selects reports whether a resource selects the Pod's namespace, and by which kinds of selector.
func (j *judge) selects(r *v1alpha1.ImagePullSecret, rendered impsync.Rendered) (Answer, []string) {
	by := []string{}
	if !j.listed {
		return Unknown, by
	}
	namespaces, pods := r.Spec.Target.Namespaces, r.Spec.Target.NamespacesWithPods
	if !rendered.Target.IsZero() {
		namespaces, pods = rendered.Namespaces, rendered.Pods // what is in force
	}
	unknown := false
	for _, kind := range []struct {
		name      string
		selectors v1alpha1.NamespaceSelector
	}{
		{"name", v1alpha1.NamespaceSelector{Names: namespaces.Names}},
		{"label", v1alpha1.NamespaceSelector{Labels: namespaces.Labels}},
		{"annotation", v1alpha1.NamespaceSelector{Annotations: namespaces.Annotations}},
	} {
		selection, _, err := impsync.CompileSelection(kind.selectors, v1alpha1.PodSelector{})
		switch {
		case err != nil:
			unknown = true
		case selection.SelectsByName(j.pod.Namespace), j.namespace != nil && selection.SelectsByRule(j.pod.Namespace, j.namespace.Labels, j.namespace.Annotations):
			by = append(by, kind.name)
		case j.namespace == nil && selection.HasMetadataRules():
			unknown = true
		}
	}
	selection, _, err := impsync.CompileSelection(v1alpha1.NamespaceSelector{}, pods)
	if err == nil && slices.ContainsFunc(j.neighbours, func(p corev1.Pod) bool { return selection.MatchesPod(p.Labels, p.Annotations) }) {
		by = append(by, "pods")
	}
	switch {
	case len(by) > 0:
		return Yes, by
	case unknown:
		return Unknown, by
	default:
		return No, by
	}
}

func (j *judge) secretState(r *v1alpha1.ImagePullSecret, rendered impsync.Rendered, s *secret, readable bool, image string) SecretState {
	switch {
	case !readable:
		return SecretUnknown
	case s == nil:
		return SecretAbsent
	case s.existing.Ownership == impsync.Foreign:
		return SecretForeign
	case s.existing.OwnerUID != r.UID:
		return SecretClaimed
	case s.existing.Ownership != impsync.Ours, !rendered.Target.IsZero() && s.existing.Revision != rendered.Target.Revision(),
		s.err != nil, !s.credentials.Serves(image):
		return SecretStale
	default:
		return SecretCurrent
	}
}

// way follows the credentials of a resource from the resource to the kubelet, and stops where they got stuck.
func (j *judge) way(r *v1alpha1.ImagePullSecret, found *Resource, deliversNothing bool, s *secret, c *Container, failing bool) verdict {
	namespace, describe := j.pod.Namespace, "kubectl describe imps "+r.Name+" says more"
	switch {
	case r.DeletionTimestamp != nil:
		return verdict{CauseNotDelivering, "it is being deleted", "use another ImagePullSecret, or make it anew"}
	case deliversNothing && r.Status.ObservedGeneration == 0:
		return verdict{CauseNotDelivering, "no coordinator has dealt with it yet", "see that a coordinator runs and leads; its log says what keeps it"}
	case deliversNothing:
		return verdict{CauseNotDelivering, "it delivers nothing: " + cmp.Or(r.Status.Reason, "it asks for nothing"), describe}
	case found.Selected == No:
		return verdict{CauseNotSelected, "no selector of its spec.target selects namespace " + namespace,
			"give the namespace what one of its selectors asks for, or add the namespace to them; imps-node plan shows the effect beforehand"}
	case j.excluded.Matches(namespace):
		return verdict{CauseExcluded, "it selects namespace " + namespace + ", which --excluded-namespaces excludes", "change the chart's value excludedNamespaces, or move the Pod"}
	}
	switch found.SecretState {
	case SecretClaimed:
		return verdict{CauseClaimed, fmt.Sprintf("Secret %s is of ImagePullSecret %s, which is older and claims it, too", found.Secret, cmp.Or(s.owner, string(s.existing.OwnerUID))),
			"give one of the two another spec.target.secret.name"}
	case SecretForeign:
		return verdict{CauseForeign, "there is a Secret " + found.Secret + " that is not imps's, and is left alone", "delete or rename it, and imps puts its own there at once"}
	case SecretAbsent:
		why := "Secret " + found.Secret + " is not there"
		if condition := meta.FindStatusCondition(r.Status.Conditions, v1alpha1.ConditionSecretsReady); condition != nil && condition.Status != metav1.ConditionTrue {
			why += "; " + v1alpha1.ConditionSecretsReady + " says: " + condition.Message
		}
		return verdict{CauseNoSecret, why, describe + "; also see that the Pod's node has an agent, and that a coordinator leads"}
	case SecretStale:
		return verdict{CauseStale, "Secret " + found.Secret + " does not hold what is to be delivered", describe + "; whoever changes that Secret, or keeps imps from it, is in the way"}
	case SecretCurrent, SecretUnknown:
	}
	if !found.PodNames {
		return j.notNamed(r, found)
	}
	return j.pulls(found, s, c, failing, describe)
}

// notNamed is the verdict where the Pod does not name the Secret.
func (j *judge) notNamed(r *v1alpha1.ImagePullSecret, found *Resource) verdict {
	account, own := "ServiceAccount "+j.pod.Spec.ServiceAccountName, "add "+found.Secret+" to imagePullSecrets in the Pod's template"
	if found.AccountNames == Unknown {
		return verdict{CauseNotNamed, "the Pod does not name Secret " + found.Secret + ", and whether its " + account + " does by now is unknown", own}
	}
	switch names := impsync.PullSecrets(j.pod.Spec.ImagePullSecrets); {
	case j.hasOwnPullSecrets():
		return verdict{CauseOwnPullSecrets, fmt.Sprintf("the Pod names pull Secrets of its own (%s), and so gets none of its ServiceAccount's; %s is not among them", strings.Join(names, ", "), found.Secret), own}
	case found.AccountNames == No:
		if accounts, _ := impsync.CompileAccounts(r.Spec.Target.ServiceAccounts); accounts != nil && accounts.Matches(j.account.Name, j.account.Labels) {
			return verdict{CauseNotAttached, account + " is to name Secret " + found.Secret + ", and does not", "kubectl describe imps " + r.Name + ": " + v1alpha1.ConditionServiceAccountsReady + " says why"}
		}
		return verdict{CauseNotNamed, "neither the Pod nor its " + account + " names Secret " + found.Secret,
			own + ", or have spec.target.serviceAccounts of the ImagePullSecret select the ServiceAccount, and make the Pod anew"}
	case found.AttachedAt == nil:
		return verdict{CauseAttachedLate, account + " names Secret " + found.Secret + ", and the Pod does not: most likely it came before", j.remake(r)}
	case impsync.CameTooEarly(j.pod, j.account):
		return verdict{CauseAttachedLate, fmt.Sprintf("the Pod was made at %s, and its %s names Secret %s since %s: it came too early to get the name",
			clock(j.pod.CreationTimestamp.Time), account, found.Secret, clock(*found.AttachedAt)), j.remake(r)}
	default:
		return verdict{CauseNameRemoved, fmt.Sprintf("the Pod was made at %s, and its %s names Secret %s since %s; something has taken the name out of the Pod, as a webhook can",
			clock(j.pod.CreationTimestamp.Time), account, found.Secret, clock(*found.AttachedAt)), own + ", or find what changes Pods: kubectl get mutatingwebhookconfigurations"}
	}
}

// hasOwnPullSecrets reports whether the Pod was given a list of its own, and so gets none of its ServiceAccount's
// (plugin/pkg/admission/serviceaccount/admission.go).
func (j *judge) hasOwnPullSecrets() bool {
	if j.template != nil {
		return len(j.template.ImagePullSecrets) > 0
	}
	account := impsync.PullSecrets(j.account.ImagePullSecrets)
	return slices.ContainsFunc(j.pod.Spec.ImagePullSecrets, func(ref corev1.LocalObjectReference) bool { return !slices.Contains(account, ref.Name) })
}

// remake says how the Pod is made anew.
func (j *judge) remake(r *v1alpha1.ImagePullSecret) string {
	owner := metav1.GetControllerOf(j.pod)
	if owner == nil || j.template == nil && j.seesTemplate {
		return "delete the Pod and make it anew: it has no controller that would"
	}
	next := fmt.Sprintf("kubectl delete pod -n %s %s: %s %s makes it anew", j.pod.Namespace, j.pod.Name, owner.Kind, owner.Name)
	if r.Spec.Target.Rescue {
		next += "; or wait: imps evicts it, where --allow-rescue and disruption budgets allow that, one of a controller in ten minutes"
	}
	return next
}

// pulls is the verdict where all is in its place.
func (j *judge) pulls(found *Resource, s *secret, c *Container, failing bool, describe string) verdict {
	switch {
	case found.Expires != nil && !j.now.Before(*found.Expires):
		return verdict{CauseExpired, "its credentials for the image have expired at " + clock(*found.Expires) + ", and were not renewed", describe + ": SourcesReady tells why"}
	case !failing:
		return verdict{CauseServed, "Secret " + found.Secret + " is there, and the Pod names it", "nothing"}
	case c.ErrorTime != nil && s != nil && c.ErrorTime.Before(s.written):
		return verdict{CauseBackOff, fmt.Sprintf("the last pull failed at %s, and Secret %s is as it is since %s", clock(*c.ErrorTime), found.Secret, clock(s.written)),
			"wait: the kubelet tries again within five minutes, and then finds it"}
	}
	switch cause := failureOf(c); cause {
	case CauseRefused:
		return verdict{cause, "the registry refuses the credentials in Secret " + found.Secret, "try the credentials of its sources by hand; they may lack the right to pull " + c.Repository}
	case CauseImageNotFound:
		return verdict{cause, "the registry says that there is no such image", "check its name and tag; some registries say so as well to those who have no right to it"}
	default:
		return verdict{CausePullFailed, "Secret " + found.Secret + " is there, and the Pod names it; the pull fails for another reason", "the kubelet's error says more"}
	}
}

func clock(at time.Time) string { return at.UTC().Format(time.RFC3339) }
