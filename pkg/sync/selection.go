package sync

import (
	"errors"
	"fmt"
	"slices"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
)

// Selection answers which namespaces a resource selects. It is immutable.
//
// A namespace is selected when any namespace rule matches it, or any Pod rule matches
// a Pod in it; inside one entry everything must match (banzaicloud/imps's semantics).
type Selection struct {
	// all: there is an empty entry, which matches every namespace.
	all         bool
	names       map[string]struct{}
	labels      []labels.Selector
	annotations []annotationMatcher

	podLabels      []labels.Selector
	podAnnotations []annotationMatcher
}

// CompileSelection compiles the selectors of a resource. An error means that a
// namespace selector cannot be evaluated, and with it the whole resource. Pod selectors
// that cannot be evaluated are left out and returned as skipped; the others count.
func CompileSelection(namespaces v1alpha1.NamespaceSelector, pods v1alpha1.PodSelector) (selection *Selection, skipped []error, err error) {
	s := &Selection{}
	if len(namespaces.Names) > 0 {
		s.names = make(map[string]struct{}, len(namespaces.Names))
		for _, name := range namespaces.Names {
			s.names[name] = struct{}{}
		}
	}
	var bad []error
	s.labels, bad = compileLabels("namespaces.labels", namespaces.Labels)
	annotations, badAnnotations := compileAnnotations("namespaces.annotations", namespaces.Annotations)
	s.annotations = annotations
	if err := errors.Join(append(bad, badAnnotations...)...); err != nil {
		return nil, nil, err
	}
	s.all = slices.ContainsFunc(s.labels, labels.Selector.Empty) ||
		slices.ContainsFunc(s.annotations, func(m annotationMatcher) bool { return len(m) == 0 })
	s.podLabels, skipped = compileLabels("namespacesWithPods.labels", pods.Labels)
	s.podAnnotations, bad = compileAnnotations("namespacesWithPods.annotations", pods.Annotations)
	return s, append(skipped, bad...), nil
}

func compileLabels(field string, entries []metav1.LabelSelector) (compiled []labels.Selector, bad []error) {
	for i := range entries {
		selector, err := metav1.LabelSelectorAsSelector(&entries[i])
		if err != nil {
			bad = append(bad, fmt.Errorf("spec.target.%s[%d]: %w", field, i, err))
			continue
		}
		compiled = append(compiled, selector)
	}
	return compiled, bad
}

// SelectsByRule reports whether a namespace rule selects the namespace.
func (s *Selection) SelectsByRule(name string, nsLabels, nsAnnotations map[string]string) bool {
	return s.SelectsByName(name) || matches(s.labels, s.annotations, nsLabels, nsAnnotations)
}

// SelectsByName reports whether a namespace rule selects the namespace whatever labels and
// annotations it has.
func (s *Selection) SelectsByName(name string) bool {
	_, named := s.names[name]
	return named || s.all
}

// HasMetadataRules reports whether labels or annotations of a namespace can select it.
func (s *Selection) HasMetadataRules() bool { return len(s.labels)+len(s.annotations) > 0 }

// HasPodRules reports whether Pods can select a namespace.
func (s *Selection) HasPodRules() bool { return len(s.podLabels)+len(s.podAnnotations) > 0 }

// HasRules reports whether anything can be selected at all.
func (s *Selection) HasRules() bool {
	return len(s.names)+len(s.labels)+len(s.annotations) > 0 || s.HasPodRules()
}

// MatchesPod reports whether a Pod with these labels and annotations selects its namespace.
func (s *Selection) MatchesPod(podLabels, podAnnotations map[string]string) bool {
	return matches(s.podLabels, s.podAnnotations, podLabels, podAnnotations)
}

func matches(byLabel []labels.Selector, byAnnotation []annotationMatcher, objLabels, objAnnotations map[string]string) bool {
	for _, selector := range byLabel {
		if selector.Matches(labels.Set(objLabels)) {
			return true
		}
	}
	for _, matcher := range byAnnotation {
		if matcher.matches(objAnnotations) {
			return true
		}
	}
	return false
}

// AccountSelection answers which ServiceAccounts of a selected namespace a resource selects. It is immutable.
type AccountSelection struct {
	names  map[string]struct{}
	labels []labels.Selector
}

// CompileAccounts compiles the selectors of ServiceAccounts, none where the resource has none. Those that cannot be evaluated
// are left out and returned as skipped; the others count.
func CompileAccounts(accounts *v1alpha1.ServiceAccountSelector) (selection *AccountSelection, skipped []error) {
	if accounts == nil {
		return nil, nil
	}
	selection = &AccountSelection{names: make(map[string]struct{}, len(accounts.Names))}
	for _, name := range accounts.Names {
		selection.names[name] = struct{}{}
	}
	selection.labels, skipped = compileLabels("serviceAccounts.labels", accounts.Labels)
	return selection, skipped
}

// Matches reports whether a ServiceAccount is selected.
func (s *AccountSelection) Matches(name string, accountLabels map[string]string) bool {
	_, named := s.names[name]
	return named || matches(s.labels, nil, accountLabels, nil)
}

// annotationMatcher is a compiled AnnotationSelector: requirements that must all hold.
//
// banzaicloud/imps ran annotations through the label selector, and so failed on values
// that are no label values. Here a value is a plain string, which is a superset.
type annotationMatcher []v1alpha1.AnnotationSelectorRequirement

func compileAnnotations(field string, entries []v1alpha1.AnnotationSelector) (compiled []annotationMatcher, bad []error) {
	for i, entry := range entries {
		matcher, err := compileAnnotation(entry)
		if err != nil {
			bad = append(bad, fmt.Errorf("spec.target.%s[%d]: %w", field, i, err))
			continue
		}
		compiled = append(compiled, matcher)
	}
	return compiled, bad
}

func compileAnnotation(entry v1alpha1.AnnotationSelector) (annotationMatcher, error) {
	// Never nil: an empty entry matches everything.
	matcher := annotationMatcher{}
	for key, value := range entry.MatchAnnotations {
		matcher = append(matcher, v1alpha1.AnnotationSelectorRequirement{
			Key: key, Operator: metav1.LabelSelectorOpIn, Values: []string{value},
		})
	}
	for _, r := range entry.MatchExpressions {
		switch r.Operator {
		case metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn:
			if len(r.Values) == 0 {
				return nil, fmt.Errorf("operator %s of annotation %q needs values", r.Operator, r.Key)
			}
		case metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist:
			if len(r.Values) > 0 {
				return nil, fmt.Errorf("operator %s of annotation %q takes no values", r.Operator, r.Key)
			}
		default:
			return nil, fmt.Errorf("%q is not an operator: use In, NotIn, Exists or DoesNotExist", r.Operator)
		}
		matcher = append(matcher, r)
	}
	return matcher, nil
}

func (m annotationMatcher) matches(annotations map[string]string) bool {
	for _, r := range m {
		value, there := annotations[r.Key]
		var ok bool
		switch r.Operator {
		case metav1.LabelSelectorOpIn:
			ok = there && slices.Contains(r.Values, value)
		case metav1.LabelSelectorOpNotIn:
			ok = !there || !slices.Contains(r.Values, value)
		case metav1.LabelSelectorOpExists:
			ok = there
		case metav1.LabelSelectorOpDoesNotExist:
			ok = !there
		}
		if !ok {
			return false
		}
	}
	return true
}
