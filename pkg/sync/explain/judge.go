package explain

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"

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
	pod := f.pod
	result := Result{
		Namespace: pod.Namespace, Pod: pod.Name, Node: pod.Spec.NodeName, ServiceAccount: pod.Spec.ServiceAccountName,
		Containers: []Container{}, Unknown: []string{},
	}
	j := &judge{facts: f, excluded: excluded, now: now, candidates: f.resources}
	if !f.listed {
		j.candidates = f.inferred()
	}
	for _, c := range pod.Spec.InitContainers {
		result.Containers = append(result.Containers, j.container(c.Name, c.Image, pod.Status.InitContainerStatuses))
	}
	for _, c := range pod.Spec.Containers {
		result.Containers = append(result.Containers, j.container(c.Name, c.Image, pod.Status.ContainerStatuses))
	}
	for _, c := range pod.Spec.EphemeralContainers {
		result.Containers = append(result.Containers, j.container(c.Name, c.Image, pod.Status.EphemeralContainerStatuses))
	}
	for _, v := range pod.Spec.Volumes {
		if v.Image != nil {
			result.Containers = append(result.Containers, j.volume(v.Name, v.Image.Reference))
		}
	}
	for _, text := range f.unknown {
		result.Unknown = append(result.Unknown, printable(text))
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

// Reasons for which a container waits: about its image, of pkg/kubelet/images/types.go; and of what comes after that.
const (
	reasonNeverPull   = "ErrImageNeverPull"
	reasonInvalid     = "InvalidImageName"
	reasonUnavailable = "RegistryUnavailable"
)

var (
	pullReasons  = []string{"ErrImagePull", "ImagePullBackOff", reasonNeverPull, reasonInvalid, "ImageInspectError", reasonUnavailable, "SignatureValidationFailed"}
	laterReasons = []string{"CrashLoopBackOff", "CreateContainerConfigError", "CreateContainerError", "RunContainerError", "StartError", "PreStartHookError", "PostStartHookError"}
)

// container finds out about one container.
func (j *judge) container(name, image string, statuses []corev1.ContainerStatus) Container {
	c := Container{Name: name, Image: image, State: "Waiting"}
	pulled, failing := false, false
	if i := slices.IndexFunc(statuses, func(s corev1.ContainerStatus) bool { return s.Name == name }); i >= 0 {
		switch state := statuses[i].State; {
		case state.Running != nil:
			c.State, pulled = "Running", true
		case state.Terminated != nil:
			c.State, pulled = "Terminated", true
		case state.Waiting != nil:
			c.State = cmp.Or(state.Waiting.Reason, c.State)
			pulled = slices.Contains(laterReasons, c.State)
			// The container of an image volume that cannot be pulled says that of the volume's image.
			failing = slices.Contains(pullReasons, c.State) && j.volumeIn(state.Waiting.Message) == ""
			if failing {
				j.lastError(&c, state.Waiting.Message)
			}
		}
	}
	return j.conclude(c, pulled, failing)
}

// volume finds out about the image of a volume.
func (j *judge) volume(name, image string) Container {
	c := Container{Name: "volume " + name, Image: image, State: "Waiting"}
	status := j.pod.Status
	failing, pulled := false, false
	for _, s := range slices.Concat(status.InitContainerStatuses, status.ContainerStatuses) {
		if w := s.State.Waiting; w != nil && slices.Contains(pullReasons, w.Reason) && j.volumeIn(w.Message) == image {
			failing, c.State = true, w.Reason
			j.lastError(&c, w.Message)
		}
		pulled = pulled || s.State.Running != nil
	}
	if pulled && !failing {
		c.State = "Mounted"
	}
	return j.conclude(c, pulled, failing)
}

// volumeIn returns the image of a volume that a message is about.
func (j *judge) volumeIn(message string) string {
	for _, v := range j.pod.Spec.Volumes {
		if v.Image != nil && v.Image.Reference != "" && strings.Contains(message, `"`+v.Image.Reference+`"`) {
			return v.Image.Reference
		}
	}
	return ""
}

// backOff is what a kubelet says as long as it waits; from 1.31 on, the error before follows it.
var backOff = regexp.MustCompile(`^Back-off pulling image "[^"]*"(: (ErrImagePull: )?)?`)

// lastError sets what the kubelet has said last about an image: in the status of a container, which is of the last pull, or, where
// that does not tell, in an Event, of which the API server may lack the last ones.
func (j *judge) lastError(c *Container, message string) {
	said := backOff.ReplaceAllString(message, "")
	for _, event := range j.failures {
		if !strings.Contains(event.message, `"`+c.Image+`"`) {
			continue
		}
		if said == "" || strings.HasSuffix(event.message, said) {
			said = event.message
			if !event.at.IsZero() {
				c.ErrorTime = &event.at
			}
		}
		break
	}
	c.Error = cmp.Or(said, message)
	if said == "" {
		c.unknownError = true
	}
}

// conclude is the end of each.
func (j *judge) conclude(c Container, pulled, failing bool) Container {
	var err error
	c.Resources = []Resource{}
	if c.Repository, err = dockerconfig.Repository(c.Image); err == nil {
		c.Resources = j.resourcesFor(&c, failing)
	}
	v := j.judge(&c, pulled, failing)
	c.Cause, c.Why, c.Next = v.cause, printable(v.why), printable(v.next)
	c.Name, c.Image, c.State, c.Error = printable(c.Name), printable(c.Image), printable(c.State), printable(c.Error)
	return c
}

// The parts of a URL that may hold a password, or a signature.
var (
	userInformation = regexp.MustCompile(`(https?://)[^/\s"'@]*@`)
	query           = regexp.MustCompile(`(https?://[^\s"'?]*)\?[^\s"']*`)
)

// printable is a text that others have written, without what a terminal would obey, without what may be a credential in a URL, and
// not endless.
func printable(text string) string {
	const most = 2000
	text = query.ReplaceAllString(userInformation.ReplaceAllString(text, "$1"), "$1?...")
	if len(text) > most {
		text = strings.ToValidUTF8(text[:most], "") + "..."
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, text)
}

// judge is the verdict on a container.
func (j *judge) judge(c *Container, pulled, failing bool) verdict {
	failed := failureOf(c)
	switch {
	case j.pod.DeletionTimestamp != nil:
		return verdict{CauseFinished, "the Pod is being deleted", "nothing"}
	case j.pod.Status.Phase == corev1.PodSucceeded || j.pod.Status.Phase == corev1.PodFailed:
		return verdict{CauseFinished, "the Pod has come to its end, and pulls nothing any more", "nothing about images; kubectl describe pod tells why it ended"}
	case pulled:
		return verdict{CausePulled, "the image is on the node, as the container has run or is about to", "nothing about the image"}
	case c.Repository == "" || c.State == reasonInvalid:
		return verdict{CauseInvalidImage, "what the spec says is no image reference", "correct the image in the Pod's template"}
	case failing && failed == CauseUnreachable:
		return verdict{CauseUnreachable, "the node cannot reach the registry, or cannot trust it; credentials would not help",
			"check names, routes, proxies and certificates from the node to " + host(c.Repository)}
	case failing && failed == CausePullFailed && c.State != reasonNeverPull:
		return verdict{CausePullFailed, "the pull fails for a reason that is not about credentials, which the kubelet's error tells", "see that error"}
	}
	best := verdict{CauseNotInstalled, "the cluster does not know ImagePullSecrets, so that there are no credentials of imps", "install the chart"}
	if j.installed {
		best = j.best(c)
	}
	if failing && c.State != reasonNeverPull {
		return j.andOthers(best, c)
	}
	v := verdict{CauseWaiting, "no pull has failed so far", "kubectl describe pod tells what it waits for"}
	switch {
	case c.State == reasonNeverPull:
		v = verdict{CauseNeverPull, "imagePullPolicy is Never, and the image is not on the node, or not for whoever has this Pod's credentials", "change imagePullPolicy in the Pod's template"}
	case j.pod.Spec.NodeName == "":
		v = verdict{CauseNotScheduled, "no node has the Pod yet, so that nothing is pulled", "kubectl describe pod tells why it is not scheduled"}
	}
	switch {
	case !j.installed, best.cause == CauseServed, best.cause == CauseUnknown:
	case best.cause == CauseNodeProvider:
		v.why += "; if the image is private: " + best.why
	default:
		v.why += "; if the image is private, this is in the way: " + best.why
	}
	return v
}

// best is the verdict on the resource that got furthest.
func (j *judge) best(c *Container) verdict {
	// Of those that have none, one that selects the namespace may be what is meant to.
	broken := slices.IndexFunc(c.Resources, func(r Resource) bool { return r.Cause == CauseNotDelivering && r.Selected == Yes })
	// A node may serve what selects nothing.
	counts := func(r Resource) bool { return r.Selected != No || further(r.Cause, CauseNotSelected) }
	if len(c.Resources) > 0 && c.Resources[0].Holds == Yes && (broken < 0 || counts(c.Resources[0])) {
		first := c.Resources[0]
		v := verdict{first.Cause, "ImagePullSecret " + first.Name + ": " + first.Why, first.Next}
		if first.Cause == CauseRefused || first.Cause == CauseImageNotFound || first.Cause == CauseNodeProvider {
			// Others may be meant for just this repository.
			for _, r := range c.Resources[1:] {
				if r.Holds == Yes && r.Cause != first.Cause {
					v.why += "; ImagePullSecret " + r.Name + " has some, too: " + r.Why
					v.next += "; or " + r.Next
				}
			}
		}
		return v
	}
	if broken >= 0 {
		r := c.Resources[broken]
		return verdict{r.Cause, "ImagePullSecret " + r.Name + " may be meant to have credentials for the image: " + r.Why, r.Next}
	}
	if len(c.Resources) > 0 || !j.listed {
		return verdict{CauseUnknown, "which ImagePullSecrets have credentials for " + host(c.Repository) + " cannot be seen with these rights", "ask somebody who may see what is unknown"}
	}
	v := verdict{CauseNoResource, fmt.Sprintf("none of the %d ImagePullSecrets has credentials for %s", len(j.candidates), c.Repository),
		"check the image's name; if it is private, add a source with credentials for " + host(c.Repository) + " to an ImagePullSecret, unless the nodes themselves are to have rights there"}
	if failureOf(c) == CauseLimited {
		v.why += ", and the registry limits pulls without"
	}
	return v
}

// andOthers adds what is to be said of Secrets that the Pod names and that are of no resource here.
func (j *judge) andOthers(v verdict, c *Container) verdict {
	for _, name := range impsync.PullSecrets(j.pod.Spec.ImagePullSecrets) {
		s, readable := j.secrets[name]
		switch {
		case slices.ContainsFunc(c.Resources, func(r Resource) bool { return r.Secret == name }) || !readable:
		case s == nil:
			v.why += "; Secret " + name + ", which the Pod names, is not there"
		case s.err == nil && s.credentials.Serves(c.Image):
			v.why += "; Secret " + name + ", which the Pod names, has credentials for the image, and is of no ImagePullSecret"
		}
	}
	return v
}

func host(repository string) string {
	host, _, _ := strings.Cut(repository, "/")
	return host
}

// failureOf is why the pull of a container's image failed last; empty where the kubelet does not tell.
func failureOf(c *Container) Cause {
	switch {
	case c.unknownError:
		return ""
	case c.State == reasonUnavailable:
		return CauseUnreachable
	case strings.Contains(strings.ToLower(c.Error), "toomanyrequests"), strings.Contains(strings.ToLower(c.Error), "429 too many requests"):
		return CauseLimited
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
	found := Resource{Name: printable(r.Name), Secret: r.Spec.Target.Secret.Name}
	if !rendered.Target.IsZero() {
		found.Secret = rendered.Target.Name()
	}
	s := j.secrets[found.Secret]
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
	found.SecretState = j.secretState(r, rendered, found.Secret, c.Image)
	found.PodNames = slices.Contains(impsync.PullSecrets(j.pod.Spec.ImagePullSecrets), found.Secret)
	found.AccountNames = Unknown
	if j.seesAccount {
		found.AccountNames = No
	}
	if j.account != nil && slices.Contains(impsync.PullSecrets(j.account.ImagePullSecrets), found.Secret) {
		found.AccountNames = Yes
		if at := impsync.AttachedAt(j.account); !at.IsZero() && slices.Contains(impsync.Attached(j.account), found.Secret) {
			found.AttachedAt = &at
		}
	}
	found.Expires = expiry(rendered, held, c.Image)
	v := join(j.way(r, &found, deliversNothing, s, c, failing), j.byNode(r, &found, held, c, failing))
	found.Cause, found.Why, found.Next, found.Secret = v.cause, printable(v.why), printable(v.next), printable(found.Secret)
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

// selects reports whether a resource selects the Pod's namespace, and by which kinds of selector: as it is in force, or, where
// nothing is, as its spec says.
func (j *judge) selects(r *v1alpha1.ImagePullSecret, rendered impsync.Rendered) (Answer, []string) {
	switch {
	case !j.listed:
		return Unknown, []string{}
	case rendered.Target.IsZero():
		return j.selectedBy(r.Spec.Target.Namespaces, r.Spec.Target.NamespacesWithPods)
	default:
		return j.selectedBy(rendered.Namespaces, rendered.Pods)
	}
}

func (j *judge) selectedBy(namespaces v1alpha1.NamespaceSelector, pods v1alpha1.PodSelector) (Answer, []string) {
	by, unknown := []string{}, false
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
	if err == nil && slices.ContainsFunc(j.neighbours, func(p metav1.ObjectMeta) bool { return selection.MatchesPod(p.Labels, p.Annotations) }) {
		by = append(by, "pods")
	} else if err == nil && !j.seesPods && selection.HasPodRules() {
		unknown = true
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

func (j *judge) secretState(r *v1alpha1.ImagePullSecret, rendered impsync.Rendered, name, image string) SecretState {
	s, readable := j.secrets[name]
	switch {
	case !readable:
		return SecretUnknown
	case s == nil:
		return SecretAbsent
	case s.existing.Ownership == impsync.Foreign:
		return SecretForeign
	case s.existing.OwnerUID != r.UID && j.older(r, name) != "":
		return SecretClaimed
	case s.existing.OwnerUID != r.UID, s.existing.Ownership != impsync.Ours, s.existing.Deleting, s.err != nil, !s.credentials.Serves(image):
		return SecretStale
	case rendered.Target.IsZero():
		return SecretPresent
	case s.existing.Revision != rendered.Target.Revision():
		return SecretStale
	}
	want, err := rendered.Target.Credentials()
	if err != nil || !slices.EqualFunc(want.Entries(), s.credentials.Entries(), dockerconfig.Entry.Equal) {
		return SecretStale
	}
	return SecretCurrent
}

// older returns an older resource that wants the same Secret in the namespace, as the coordinator has it (impsync.ResourceRef).
func (j *judge) older(r *v1alpha1.ImagePullSecret, secret string) string {
	for i := range j.candidates {
		other := &j.candidates[i]
		rendered := j.rendered[other.UID]
		if other.UID == r.UID || other.DeletionTimestamp != nil || rendered.Target.Name() != secret || impsync.RefOf(other).Compare(impsync.RefOf(r)) > 0 {
			continue
		}
		if selected, _ := j.selects(other, rendered); selected == Yes {
			return other.Name
		}
	}
	return ""
}

// way follows the credentials of a resource from the resource to the kubelet, and stops where they got stuck.
func (j *judge) way(r *v1alpha1.ImagePullSecret, found *Resource, deliversNothing bool, s *secret, c *Container, failing bool) verdict {
	namespace, describe := j.pod.Namespace, "kubectl describe imps "+r.Name+" says more"
	there := found.SecretState == SecretCurrent || found.SecretState == SecretPresent
	switch {
	case r.DeletionTimestamp != nil && (!there || !found.PodNames):
		return verdict{CauseNotDelivering, "it is being deleted", "use another ImagePullSecret, or make it anew"}
	case deliversNothing && r.Status.ObservedGeneration == 0:
		return verdict{CauseNotDelivering, "no coordinator has dealt with it yet", "see that a coordinator runs and leads; its log says what keeps it"}
	case deliversNothing:
		return verdict{CauseNotDelivering, "it delivers nothing: " + cmp.Or(r.Status.Reason, "it asks for nothing"), describe}
	case found.Selected == No:
		if selected, _ := j.selectedBy(r.Spec.Target.Namespaces, r.Spec.Target.NamespacesWithPods); selected == Yes {
			return verdict{CauseNotDelivering, "its spec selects namespace " + namespace + ", and is not in force yet: " + cmp.Or(r.Status.Reason, "no coordinator has dealt with it"), describe}
		}
		return verdict{CauseNotSelected, "no selector of its spec.target selects namespace " + namespace,
			"give the namespace what one of its selectors asks for, or add the namespace to them; imps-node plan shows the effect beforehand"}
	case j.excluded.Matches(namespace):
		return verdict{CauseExcluded, "it selects namespace " + namespace + ", which --excluded-namespaces excludes", "change the chart's value excludedNamespaces, or move the Pod"}
	}
	switch found.SecretState {
	case SecretClaimed:
		return verdict{CauseClaimed, fmt.Sprintf("Secret %s is of ImagePullSecret %s, which is older and claims it, too", found.Secret, j.older(r, found.Secret)),
			"give one of the two another spec.target.secret.name"}
	case SecretForeign:
		return verdict{CauseForeign, "there is a Secret " + found.Secret + " that is not imps's, and is left alone", "delete or rename it, and imps puts its own there at once"}
	case SecretAbsent:
		why := "Secret " + found.Secret + " is not there"
		if condition := meta.FindStatusCondition(r.Status.Conditions, v1alpha1.ConditionSecretsReady); condition != nil && condition.Status != metav1.ConditionTrue {
			why += "; " + v1alpha1.ConditionSecretsReady + " says: " + condition.Message
		}
		if excluded := j.untold(r); excluded != "" {
			why += "; " + excluded
		}
		return verdict{CauseNoSecret, why, describe + "; also see that the Pod's node has an agent, and that a coordinator leads"}
	case SecretStale:
		return j.stale(r, found.Secret, s, describe)
	case SecretCurrent, SecretPresent, SecretUnknown:
	}
	if !found.PodNames {
		return j.notNamed(r, found)
	}
	return j.pulls(r, found, s, c, failing)
}

// untold says that namespaces are excluded of which explain was not told; empty where none are.
func (j *judge) untold(r *v1alpha1.ImagePullSecret) string {
	if n := r.Status.Namespaces; n != nil && n.Excluded > 0 && len(j.excluded) == 0 {
		return fmt.Sprintf("%d namespaces are excluded by the coordinator's --excluded-namespaces, which were not given here", n.Excluded)
	}
	return ""
}

// stale is the verdict on a Secret that is imps's and not what it should be.
func (j *judge) stale(r *v1alpha1.ImagePullSecret, name string, s *secret, describe string) verdict {
	switch {
	case s.existing.Deleting:
		return verdict{CauseStale, "Secret " + name + " is being deleted, and a finalizer holds it", "find out whose finalizer that is: kubectl get secret -o yaml"}
	case s.existing.OwnerUID != r.UID || s.existing.Ownership != impsync.Ours:
		return verdict{CauseStale, "Secret " + name + " is of another ImagePullSecret, of IMPS, or of a backup, and was not taken over yet", describe + "; also see that a coordinator leads"}
	default:
		return verdict{CauseStale, "Secret " + name + " does not hold what is to be delivered", describe + "; whoever changes that Secret, or keeps imps from it, is in the way (kubectl get secret --show-managed-fields tells who)"}
	}
}

// notNamed is the verdict where the Pod does not name the Secret.
func (j *judge) notNamed(r *v1alpha1.ImagePullSecret, found *Resource) verdict {
	account, own := "ServiceAccount "+cmp.Or(j.pod.Spec.ServiceAccountName, "-"), "add "+found.Secret+" to imagePullSecrets in the Pod's template"
	if j.template != nil && slices.Contains(impsync.PullSecrets(j.template.ImagePullSecrets), found.Secret) {
		return verdict{CauseTemplateNewer, "the Pod's template names Secret " + found.Secret + " by now, and the Pod is of before", j.remake(r)}
	}
	switch names := impsync.PullSecrets(j.pod.Spec.ImagePullSecrets); {
	case !j.seesAccount:
		return verdict{CauseNotNamed, "the Pod does not name Secret " + found.Secret + ", and whether its " + account + " does by now is unknown", own}
	case j.account == nil:
		return verdict{CauseNotNamed, "the Pod does not name Secret " + found.Secret + ", and its " + account + " is not there (any more)", own}
	case j.hasOwnPullSecrets():
		return verdict{CauseOwnPullSecrets, fmt.Sprintf("the Pod has pull Secrets of its own (%s), and so gets none of its ServiceAccount's; %s is not among them", strings.Join(names, ", "), found.Secret), own}
	case found.AccountNames == No:
		if accounts, _ := impsync.CompileAccounts(r.Spec.Target.ServiceAccounts); accounts != nil && accounts.Matches(j.account.Name, j.account.Labels) {
			return verdict{CauseNotAttached, account + " is to name Secret " + found.Secret + ", and does not", "kubectl describe imps " + r.Name + ": " + v1alpha1.ConditionServiceAccountsReady + " says why"}
		}
		return verdict{CauseNotNamed, "neither the Pod nor its " + account + " names Secret " + found.Secret,
			own + ", or have spec.target.serviceAccounts of the ImagePullSecret select the ServiceAccount, and make the Pod anew"}
	case found.AttachedAt == nil:
		return verdict{CauseAttachedLate, account + " names Secret " + found.Secret + ", and the Pod does not: most likely it came before", j.remake(r)}
	}
	times := fmt.Sprintf("the Pod was made at %s, and its %s names Secret %s since %s at the latest", clock(j.pod.CreationTimestamp.Time), account, found.Secret, clock(*found.AttachedAt))
	if impsync.CameTooEarly(j.pod, j.account) {
		return verdict{CauseAttachedLate, times + ": it came too early to get the name", j.remake(r)}
	}
	return verdict{CauseNameRemoved, times + "; something has taken the name out of the Pod, as a webhook can", own + ", or find what changes Pods: kubectl get mutatingwebhookconfigurations"}
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
	if owner == nil {
		return "delete the Pod and make it anew: it has no controller that would"
	}
	next := fmt.Sprintf("kubectl delete pod -n %s %s: %s %s makes it anew", j.pod.Namespace, j.pod.Name, owner.Kind, owner.Name)
	switch {
	case j.template == nil && j.seesTemplate:
		return next + ", if it is still there, and does such things"
	case r.Spec.Target.Rescue:
		return next + "; or wait: imps evicts it, where --allow-rescue and disruption budgets allow that, one of a controller in ten minutes"
	default:
		return next
	}
}

// longestBackOff is how long a kubelet waits at most before it pulls again, and some.
const longestBackOff = 6 * time.Minute

// pulls is the verdict where all is in its place.
func (j *judge) pulls(r *v1alpha1.ImagePullSecret, found *Resource, s *secret, c *Container, failing bool) verdict {
	secret := "Secret " + found.Secret + " is there, and the Pod names it"
	if s == nil {
		secret = "the Pod names Secret " + found.Secret + ", which cannot be read with these rights"
	}
	switch {
	case j.expired(found):
		return expired(r, found)
	case !failing:
		return verdict{CauseServed, secret, "nothing"}
	case s != nil && c.ErrorTime != nil && c.ErrorTime.Before(s.written) && j.now.Sub(s.written) < longestBackOff:
		return verdict{CauseBackOff, fmt.Sprintf("the last pull failed at %s, and Secret %s is as it is since %s", clock(*c.ErrorTime), found.Secret, clock(s.written)),
			"wait: the kubelet tries again within five minutes, and then finds it"}
	}
	switch cause := failureOf(c); cause {
	case CauseRefused:
		return verdict{cause, secret + "; the registry refuses what it holds", "try the credentials of the sources of ImagePullSecret " + r.Name + " by hand; they may lack the right to pull " + c.Repository}
	case CauseImageNotFound:
		return verdict{cause, secret + "; the registry says that there is no such image", "check its name and tag; some registries say so as well to those who have no right to it"}
	case CauseLimited:
		return verdict{cause, secret + "; the registry limits how many are pulled", "wait, or raise the limit of that account"}
	default:
		return verdict{CausePullFailed, secret + "; why the pull fails all the same, the kubelet does not tell", "kubectl describe pod, and the kubelet's log, may say more"}
	}
}

func (j *judge) expired(found *Resource) bool {
	return found.Expires != nil && !j.now.Before(*found.Expires)
}

func expired(r *v1alpha1.ImagePullSecret, found *Resource) verdict {
	return verdict{CauseExpired, "its credentials for the image have expired at " + clock(*found.Expires) + ", and were not renewed",
		"kubectl describe imps " + r.Name + " says more: SourcesReady tells why"}
}

func clock(at time.Time) string { return at.UTC().Format(time.RFC3339) }
